"What holds for the project as a whole: generated files in step, notebooks clean, chapters complete, names documented and tested, imports one way."
import ast, filecmp, importlib, inspect, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from fastcore.docments import docments
from tokbook.claims import MIME, VERDICTS, saved_ledger
from tokbook.lazy import exported_names

ROOT = Path(__file__).resolve().parent.parent
PARTS = ['text', 'quantize', 'image', 'audio', 'generate', 'multimodal', 'efficient', 'reason', 'retrieve']
NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(d.startswith(('.', '_')) for d in p.relative_to(ROOT).parts)]
source = lambda cell: ''.join(cell['source'])
CELLS = {p: json.loads(p.read_text(encoding='utf-8'))['cells'] for p in NOTEBOOKS}
MODULE = {p: m.group(1) for p, cells in CELLS.items() for c in cells if (m := re.match(r'#\|\s*default_exp (\S+)', source(c)))}
CHAPTERS = [p for p, m in MODULE.items() if m.split('.')[0] in PARTS and not m.endswith('__init__')]
name = lambda p: p.stem if isinstance(p, Path) else str(p)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources with the generated package made anew and the notebooks cleaned anew."
    d = tmp_path_factory.mktemp('copy')
    for f in ('settings.ini', 'README.md', 'pyproject.toml'): shutil.copy(ROOT/f, d)
    shutil.copytree(ROOT/'nbs', d/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_*'))
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    for cmd in ('nbdev_export', 'nbdev_clean'): subprocess.run([cmd], cwd=d, env=env, check=True, capture_output=True)
    return d


def test_export_in_step(copy):
    made = {p.relative_to(copy): p for p in (copy/'tokbook').rglob('*.py')}
    here = {p.relative_to(ROOT): p for p in (ROOT/'tokbook').rglob('*.py')}
    assert set(made) == set(here), 'run `make export`: modules added or removed'
    differ = [str(k) for k in made if made[k].read_text() != here[k].read_text()]
    assert not differ, f'run `make export`: {differ}'


def test_notebooks_clean(copy):
    differ = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if not filecmp.cmp(p, copy/p.relative_to(ROOT), shallow=False)]
    assert not differ, f'run nbdev_clean: {differ}'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=name)
def test_saved_outputs(nb):
    "No saved error or warning, no figure over 150 KB, no notebook over 1.5 MB."
    assert nb.stat().st_size < 1.5e6
    for c in CELLS[nb]:
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', source(c)
            assert o.get('name') != 'stderr', f'{source(c)[:200]}\n{"".join(o["text"])[:400]}'
            for mime, data in o.get('data', {}).items():
                if mime.startswith('image/'): assert len(''.join(data)) < 150_000, f'{mime} of {len("".join(data))} characters from\n{source(c)[:300]}'
    text = nb.read_text(encoding='utf-8')
    assert not re.search(r'/(?:root|home|work|tmp)/[\w.]+', text), 'a path of the machine that ran it'


SECTIONS = ['The idea', 'How it works', 'The experiment', 'What the paper claims, what we measured', 'On a GPU, on your own model', 'What differs from the paper', 'Exercises', 'Further reading']

@pytest.mark.parametrize('nb', CHAPTERS, ids=name)
def test_chapter_anatomy(nb):
    cells, code = CELLS[nb], [source(c) for c in CELLS[nb] if c['cell_type'] == 'code']
    prose = '\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')
    assert re.match(r'# .+\n+> .+', source(cells[0])), 'title and one-line summary'
    assert re.findall(r'^## (.+?)(?: \{.*)?$', prose, re.M) == SECTIONS
    assert any(re.search(r"paper_card\(['\"]%s['\"]\)" % MODULE[nb].split('.')[1], t) for t in code), 'paper card'
    figures = [c for c in cells if any(k.startswith('image/') for o in c.get('outputs', []) for k in o.get('data', {}))]
    assert len(figures) >= 2
    for c in figures: assert all(f'#| fig-{k}:' in source(c) for k in ('cap', 'alt')), f'caption and alternative text: {source(c)[:120]}'
    assert any('scrub(' in t for t in code), 'a thing to move'
    assert sum('#| exports' in t for t in code) >= 3 and re.search(r'@\w+\d{4}\w+', prose)
    assert max(len([l for l in t.splitlines() if l.strip()]) for t in code) <= 60
    exercises = prose.split('## Exercises')[1].split('\n## ')[0]
    assert 3 <= len(re.findall(r'^\d+\. ', exercises, re.M)) <= 6


@pytest.mark.parametrize('nb', CHAPTERS, ids=name)
def test_chapter_ledger(nb):
    rec = saved_ledger(nb)
    assert rec and rec['module'] == MODULE[nb], 'a saved ledger'
    assert rec['size'] == 'book', 'the saved outputs come from `make outputs`'
    written = ''.join(source(c) for c in CELLS[nb])
    for c in rec['claims']:
        assert c['verdict'] in VERDICTS and c['statement'] and c['paper'] and c['setting'] and c['shown'], c['key']
        assert c['key'] in written, f"{c['key']} is in the saved outputs and not in the source: run `make outputs`"
        assert c['kind'] == 'exact' or len(c['data']) >= 3, c['key']
        assert c['verdict'] == VERDICTS[0] or c['reason'], f"{c['key']} did not reproduce: say why"


def public():
    "(module, name, object) of every exported function and class."
    for mod, syms in importlib.import_module('tokbook._modidx').d['syms'].items():
        for s in syms:
            n = s.removeprefix(mod + '.')
            if '.' not in n and not n.startswith('_'): yield mod, n
PUBLIC = list(public())


@pytest.fixture(scope='module')
def checks():
    "The text of every notebook cell and test function that expects an error."
    out = [source(c) for cells in CELLS.values() for c in cells if c['cell_type'] == 'code' and re.search(r'ExceptionExpected|test_fail|\braises\(', source(c)) and '#| export' not in source(c)]
    for p in (ROOT/'tests').glob('test_*.py'):
        if p.name == Path(__file__).name: continue
        for f in ast.walk(ast.parse(p.read_text())):
            if isinstance(f, ast.FunctionDef) and f.name.startswith('test') and 'raises(' in (t := ast.unparse(f)): out.append(t)
    return '\n'.join(out)


@pytest.mark.parametrize('mod,n', PUBLIC, ids=lambda s: s)
def test_public_name(mod, n, checks):
    "A public name has a docstring, a comment and no bare `Tensor` for each argument, and a test of its bad input."
    obj = getattr(importlib.import_module(mod.removesuffix('.__init__')), n)
    assert inspect.getdoc(obj) and (obj.__doc__ or '').strip(), 'docstring'
    if inspect.isclass(obj) and '__init__' not in vars(obj): return  # a record, a protocol: nothing is checked on the way in
    fn = obj.__init__ if inspect.isclass(obj) else inspect.unwrap(obj)
    try: params = [p for k, p in inspect.signature(fn).parameters.items() if k != 'self' and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except (TypeError, ValueError): return
    if getattr(obj, '__dataclass_fields__', None): docs = docments(obj)
    else: docs = docments(fn)
    bare = [p.name for p in params if p.annotation in ('Tensor', importlib.import_module('torch').Tensor)]
    assert not bare, f'{bare} need shapes: Float[Tensor, "..."]'
    silent = [p.name for p in params if not docs.get(p.name)]
    assert not silent, f'no comment for {silent}'
    record = hasattr(obj, '__dataclass_fields__') and not hasattr(obj, '__post_init__')  # holds what it is given
    if any(not isinstance(p.default, bool) for p in params) and not record: assert re.search(rf'\b{n}\b', checks), 'no cell or test expects an error from it'


ALLOWED = dict(text=[], quantize=[], image=['quantize'], audio=['quantize'], generate=['quantize', 'image', 'audio'], multimodal=['quantize', 'image', 'audio', 'generate'],
               efficient=['text', 'quantize'], reason=['text'], retrieve=['text', 'quantize'])

def test_imports_point_one_way():
    for p in (ROOT/'tokbook').rglob('*.py'):
        part = p.relative_to(ROOT/'tokbook').parts[0]
        for node in ast.walk(ast.parse(p.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level: continue
            base = p.relative_to(ROOT/'tokbook').parts[:-1]; base = base[:len(base) - node.level + 1]
            target = (*base, *(node.module or '').split('.'))[0]
            if part not in PARTS: assert target not in PARTS, f'{p.name} is a foundation and imports {target}'
            elif target in PARTS and target != part: assert target in ALLOWED[part], f'{p} imports {target}'


@pytest.mark.parametrize('part', [p for p in PARTS if (ROOT/'tokbook'/p).is_dir()] + ['kernels'])
def test_part_offers_its_names(part):
    mod = importlib.import_module(f'tokbook.{part}')
    names = exported_names(f'tokbook.{part}')
    assert names and set(names) <= set(dir(mod))
    for n in names: assert getattr(mod, n) is getattr(importlib.import_module(names[n]), n)
    with pytest.raises(AttributeError): mod.no_such_name


def run(code, **kw): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT, **kw).stdout

def test_import_costs_nothing():
    times = [float(run('import time; t = time.perf_counter(); import tokbook, sys; print(time.perf_counter() - t); assert "torch" not in sys.modules')) for _ in range(3)]
    assert min(times) < .2
    for part in PARTS:
        if (ROOT/'tokbook'/part).is_dir(): run(f'import sys, tokbook.{part}; assert "torch" not in sys.modules')


HEAVY = {'fastai', 'transformers', 'matplotlib', 'sklearn', 'skimage', 'timm', 'IPython', 'pandas'}
LIGHT = sorted({m.removesuffix('.__init__') for m, _ in PUBLIC} - {'tokbook.viz', 'tokbook.train'})

@pytest.mark.parametrize('mod', LIGHT)
def test_module_imports_only_what_it_needs(mod):
    loaded = set(run(f'import sys, {mod}; print(*{{m.split(".")[0] for m in sys.modules}})', env=dict(os.environ)).split())
    assert not loaded & HEAVY


def tracked():
    r = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    return [ROOT/f for f in r.stdout.splitlines()] if r.returncode == 0 else [p for p in ROOT.rglob('*') if p.is_file() and '.venv' not in p.parts]

def test_owner_is_written_once():
    "The GitHub owner stands in settings.ini and is derived everywhere else (generated files aside)."
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini'); owner = cfg['DEFAULT']['user']
    where = [p.relative_to(ROOT).as_posix() for p in tracked() if p.suffix in ('.ipynb', '.yml', '.toml', '.css', '.py', '.md', '.ini', '.js') and f'github.com/{owner}' in p.read_text(encoding='utf-8', errors='ignore')]
    assert set(where) <= {'settings.ini', 'README.md', 'tokbook/_modidx.py'}, where


def test_no_registry_host_or_machine_path():
    hosts = ['pypi' + '.org', 'files.python' + 'hosted', 'registry.npm' + 'js', 'deb.' + 'debian', '/work' + '/main', '/opt' + '/pypi']
    bad = [(p.name, h) for p in tracked() if p.is_file() and p.stat().st_size < 2e6 for h in hosts if h in p.read_text(encoding='utf-8', errors='ignore')]
    assert not bad
