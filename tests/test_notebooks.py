"Every notebook is a test: it runs from top to bottom at size `ci`, through nbdev's own runner, in a process of its own."
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if not any(d.startswith(('.', '_')) for d in p.relative_to(ROOT/'nbs').parts))
RUN = '''
import sys, time
from pathlib import Path
from nbdev.test import test_nb
start, cpu = time.time(), time.process_time()
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=["slow"], basepath=sys.argv[2])
print(f"{time.time() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
sys.exit(not ok)
'''


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.with_suffix('').as_posix())
def test_notebook(nb):
    r = subprocess.run([sys.executable, '-c', RUN, str(ROOT/'nbs'/nb), str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, f'{nb} failed\n{r.stdout[-2000:]}\n{r.stderr[-6000:]}'


def test_a_failing_notebook_fails(tmp_path):
    "The runner itself can fail: a cell that raises is not swallowed."
    nb = tmp_path/'bad.ipynb'
    nb.write_text('{"cells":[{"cell_type":"code","id":"a","metadata":{},"outputs":[],"execution_count":null,"source":["assert 1 == 2"]}],'
                  '"metadata":{"kernelspec":{"name":"python3","language":"python","display_name":"python3"}},"nbformat":4,"nbformat_minor":5}')
    r = subprocess.run([sys.executable, '-c', RUN, str(nb), str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert r.returncode == 1 and 'AssertionError' in r.stderr
