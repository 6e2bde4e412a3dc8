"The wheel, outside of the repository: with the declared requirements alone, and running a chapter."
import json, os, subprocess, sys, zipfile
from importlib import metadata
from pathlib import Path
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder with nothing but the unpacked wheel."
    d = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', d, ROOT], check=True, capture_output=True, cwd=d)
    wheel, = d.glob('*.whl')
    (d/'site').mkdir(); zipfile.ZipFile(wheel).extractall(d/'site')
    return d/'site'


def closure(*roots):
    "The installed distributions that `roots` need, through their declared requirements."
    todo, seen = list(roots), {}
    while todo:
        key = todo.pop().lower().replace('_', '-')
        if key in seen: continue
        try: seen[key] = metadata.distribution(key)
        except metadata.PackageNotFoundError: continue  # for another platform
        todo += [r.name for r in map(Requirement, seen[key].requires or []) if r.marker is None or r.marker.evaluate({'extra': ''})]
    return seen


def test_only_declared_requirements(site, tmp_path):
    "`from tokbook.quantize import FSQ` with only what the wheel's own metadata asks for: no fastai, no transformers, no matplotlib."
    meta = next(site.glob('*.dist-info'))/'METADATA'
    needs = [Requirement(l.split(': ', 1)[1]) for l in meta.read_text().splitlines() if l.startswith('Requires-Dist: ') and 'extra ==' not in l]
    assert {r.name for r in needs} == {'torch', 'einops', 'fastcore', 'numpy'}
    libs = tmp_path/'libs'; libs.mkdir()
    for dist in closure(*[r.name for r in needs]).values():
        for top in {f.parts[0] for f in dist.files or [] if not f.parts[0].startswith(('..', '__pycache__'))}:
            if not (libs/top).exists(): (libs/top).symlink_to(Path(dist.locate_file(top)))
    code = (f'import sys; sys.path[:0] = [{str(site)!r}, {str(libs)!r}]\n'
            'import tokbook; assert "torch" not in sys.modules\n'
            'from tokbook.quantize import FSQ\n'
            'import torch; q = FSQ([8, 5, 5, 5]); z = torch.randn(2, 7, 4); out = q(z)\n'
            'assert out.codes.max() < q.codebook_size and torch.allclose(q.decode(out.codes), out.z_q)\n'
            'try: q.save_pretrained("x")\nexcept ImportError as e: assert "tokbook[hf]" in str(e)\nelse: raise SystemExit("saved without huggingface_hub")\n'
            'assert not {"fastai", "transformers", "matplotlib", "jaxtyping", "huggingface_hub"} & set(sys.modules)\n'
            f'assert tokbook.__file__.startswith({str(site)!r})')
    r = subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]


def test_chapter_runs_outside_the_repository(site, tmp_path):
    "A chapter's notebook, copied away, run in a real Jupyter kernel on the installed wheel."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT/'nbs/07_efficient/10_pitome.ipynb', 4)
    nb.cells.append(nbformat.v4.new_code_cell('import tokbook; print(tokbook.__file__)'))
    for c in nb.cells:
        if c.cell_type == 'code' and '#| eval: false' in c.source: c.metadata['tags'] = ['skip-execution']
    old = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = str(site)
    try: NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    finally:
        if old is None: del os.environ['PYTHONPATH']
        else: os.environ['PYTHONPATH'] = old
    assert nb.cells[-1].outputs[0].text.startswith(str(site))
