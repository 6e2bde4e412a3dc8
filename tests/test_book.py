"The rendered book: built once from the notebooks as they are, then looked at as text, as HTML, and in a browser."
import fcntl, json, os, re, shutil, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from lxml import html as lx
from tokbook import book as B

ROOT = Path(__file__).parent.parent
PAGES = B.book_pages()
ids = [p.src for p in PAGES]

@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "The folder of the rendered book and what the build said. Workers of one run share it."
    shared = tmp_path_factory.getbasetemp().parent if os.environ.get('PYTEST_XDIST_WORKER') else tmp_path_factory.mktemp('book')
    out, log = shared/'book', shared/'book.log'
    with open(shared/'book.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            r = subprocess.run([sys.executable, '-m', 'tokbook.book', 'build', '--engine', 'pandoc', '--out', str(out)], cwd=ROOT, capture_output=True, text=True)
            log.write_text(f'{r.returncode}\n{r.stdout}\n{r.stderr}')
    return out, log.read_text()

@pytest.fixture(scope='module')
def trees(book): return {p.src: lx.parse((book[0]/p.out).as_posix(), lx.HTMLParser(encoding='utf-8')).getroot() for p in PAGES if (book[0]/p.out).exists()}

def markdown(page): return '\n\n'.join(re.sub(r'^(```+).*?^\1', '', ''.join(c['source']), flags=re.M | re.S) for c in page.nb['cells'] if c['cell_type'] == 'markdown')

# ---- the table of contents

def test_every_notebook_is_in_the_book():
    on_disk = {p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if not any(d.startswith(('.', '_')) for d in p.relative_to(ROOT/'nbs').parts)}
    assert on_disk == set(ids) and len(set(ids)) == len(ids)

def test_quarto_reads_the_same_files():
    cfg = B._config()
    assert cfg['project']['type'] == 'book' and cfg['bibliography'] == 'references.bib' and cfg['metadata-files'] == ['nbdev.yml'] and 'bibliography' not in cfg['book']
    assert cfg['format']['html']['html-math-method'] == 'mathml' and set(cfg['format']['html']['theme']) == {'light', 'dark'}
    for name in ('_quarto.yml', 'styles.css'): assert (ROOT/'nbs'/name).is_symlink() and (ROOT/'nbs'/name).resolve() == ROOT/name

def test_pages_have_their_own_file_and_title():
    assert len({p.out for p in PAGES}) == len(PAGES) and all(p.title for p in PAGES)

# ---- the build

def test_builds_without_a_problem(book):
    "No broken link or anchor, no unknown label or citation, no notebook that nbdev cannot process, nothing from another host."
    assert book[1].startswith('0\n') and 'problem:' not in book[1], book[1]

def test_second_build_changes_nothing(book):
    with open(book[0].parent/'book.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {f: f.stat().st_mtime_ns for f in book[0].rglob('*') if f.is_file()}
        r = subprocess.run([sys.executable, '-m', 'tokbook.book', 'build', '--engine', 'pandoc', '--out', str(book[0])], cwd=ROOT, capture_output=True, text=True)
        changed = [f.name for f, t in before.items() if f.suffix != '.png' and f.stat().st_mtime_ns != t]
    assert not changed, f'{changed}\n{r.stdout}{r.stderr}'

def test_quarto_gets_a_project_it_can_read(tmp_path, monkeypatch):
    "A stand-in for Quarto looks at what it would be given: every listed notebook there and valid, with its links and its computed cells; and its output arrives."
    fake = tmp_path/'quarto'
    fake.write_text(f"""#!{sys.executable}
import sys, yaml, nbformat
from pathlib import Path
assert sys.argv[1] == 'render' and '--no-execute' in sys.argv
cfg = yaml.safe_load(Path('_quarto.yml').read_text()); site = yaml.safe_load(Path('nbdev.yml').read_text())
assert cfg['project']['type'] == 'book' and Path('references.bib').exists() and Path('styles.css').exists()
flat = lambda xs: [y for x in xs for y in ([x] if isinstance(x, str) else [x['part'], *x['chapters']])]
for src in flat(cfg['book']['chapters']) + cfg['book']['appendices']:
    nb = nbformat.read(src, 4); [c.pop('has_sd', 0) for c in nb.cells]; nbformat.validate(nb); text = str(nb)
    assert nb.cells[0].cell_type == 'raw' and 'output-file' in nb.cells[0].source and '.page-links' in text, src
assert 'paper-map' in Path('index.ipynb').read_text()
out = Path(site['project']['output-dir']); out.mkdir(); (out/'index.html').write_text('rendered')
"""); fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert B.build_book(tmp_path/'out') == [] and (tmp_path/'out/index.html').read_text() == 'rendered'

def test_a_build_executes_imports_and_exports_only(tmp_path):
    code = lambda s: dict(cell_type='code', source=s, metadata={}, outputs=[], execution_count=None, id=f'c{abs(hash(s))%10**6}')
    nb = dict(cells=[dict(cell_type='markdown', source='# T\n\n> s', metadata={}, id='t'), code('#| export\ndef f(): "Doc."'), code(f'import pathlib\npathlib.Path(r"{tmp_path}/ran").write_text("x")')],
              metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4, nbformat_minor=5)
    src = tmp_path/'a.ipynb'; src.write_text(json.dumps(nb))
    subprocess.run([sys.executable, '-c', f'from tokbook.book import _document; _document((__import__("pathlib").Path(r"{src}"), r"{tmp_path}/b.ipynb"))'], cwd=ROOT, check=True)
    assert not (tmp_path/'ran').exists() and 'show_doc(f)' in (tmp_path/'b.ipynb').read_text()

@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not installed')
def test_quarto_builds(tmp_path):
    assert B.build_book(tmp_path/'q', engine='quarto') == [] and B.check_links(tmp_path/'q') == []

# ---- every page

@pytest.mark.parametrize('page', PAGES, ids=ids)
def test_page(page, trees):
    t = trees[page.src]; main, = t.xpath('//main')
    text = ' '.join(main.text_content().split())
    assert t.xpath('string(//title)').strip() and t.xpath('/html/@lang') == ['en'] and len(t.xpath('//h1')) == 1 and t.xpath('string(//h1)').strip()
    assert t.xpath('//nav[@id="chapters"]//a[@aria-current="page"]') and len(t.xpath("//nav[@id='chapters']//a")) == len(trees)
    assert len(t.xpath('//nav[contains(@class,"near")]/a')) == (1 if page in (PAGES[0], PAGES[-1]) else 2)
    assert page.kind != 'chapter' or t.xpath('//a[starts-with(@href,"https://colab.research.google.com/github/")]')
    prose = ' '.join(main.xpath('.//text()[(ancestor::p or ancestor::figcaption or ancestor::li or ancestor::td) and not(ancestor::code or ancestor::pre or ancestor::annotation)]'))
    stray = re.search(r'\?\?\?|(?<!\w)@(fig|tbl|eq|sec)-\w|\?(fig|tbl|eq|sec)-\w|:::', prose)
    assert not stray, f'an unresolved reference or a stray fence: {prose[max(0, stray.start() - 80):stray.end() + 40]}'
    assert not main.xpath('.//*[contains(@class,"citation")]//strong'), 'an unknown citation'
    for a in main.xpath('.//*[contains(@class,"citation")]//a/@href'): assert t.xpath(f'//*[@id="{a[1:]}"]'), a
    for f in main.xpath('.//figure[starts-with(@id,"fig-")]'):
        assert re.match(r'Figure\s(\w+\.)?\d+:\s\S', f.xpath('string(./figcaption)').strip()), f'{f.get("id")} is not numbered'
        assert f.xpath('.//svg|.//img|.//table|.//*[@role="img"]|.//*[contains(@class,"scrub")]|./p|./div'), f'{f.get("id")} is empty: make outputs NB={Path(page.src).stem}'
        assert f.get('data-alt') and (f.xpath('.//*[@role="img"][@aria-label]|.//img[@alt!=""]|.//table|.//*[contains(@class,"scrub")]')), f'{f.get("id")} has no alternative text'
    src = (B.root()/'nbs'/page.src).read_text(encoding='utf-8')
    for label in re.findall(r'"#\| label: ((?:fig|tbl)-[\w-]+)', src): assert t.xpath(f'//*[@id="{label}"]'), f'{label} did not arrive'
    if re.search(r'\$[^$\s][^$]*\$', re.sub(r'`[^`]*`', '', markdown(page))): assert main.xpath('.//math'), 'math without MathML'
    assert '$$' not in prose
    assert not main.xpath('.//script') and (page.kind != 'chapter' or len(text) > 1000), 'the page needs a script'
    assert B.INK not in lx.tostring(main, encoding='unicode').lower() or page.src.endswith(('80_book.ipynb', '06_viz.ipynb')), 'a figure kept its sentinel ink'
    assert not t.xpath('//@onclick|//@onload')

# ---- computed pages

def test_map_shows_every_paper(trees):
    chips = trees['index.ipynb'].xpath('//table[contains(@class,"paper-map")]//*[contains(@class,"chip")]')
    links = [c for c in chips if c.tag == 'a']
    assert len(chips) == 46 == len(B.papers()) and len(links) == len(B._written()) and all('not written yet' in c.text_content() for c in chips if c.tag != 'a')

def test_references_are_sane():
    entries = B.parse_bib((ROOT/'nbs'/'references.bib').read_text(encoding='utf-8')); keys = [e['key'] for e in entries]
    assert len(keys) == len(set(keys)) and all(re.fullmatch(r'[a-z-]+(19|20)\d\d[a-z0-9-]+', k) for k in keys), [k for k in keys if not re.fullmatch(r'[a-z-]+(19|20)\d\d[a-z0-9-]+', k)]
    for e in entries: assert e.get('title') and e.get('author') and e.get('year'), e['key']
    for s, e in B.papers().items(): assert {'modality', 'operation', 'short', 'summary', 'url', 'eprint'} <= set(e) and e['modality'] in B.MODALITIES and e['operation'] in B.OPERATIONS, s

def test_ledger_page_has_every_claim(trees):
    text = ' '.join(trees['90_appendix/10_ledger.ipynb'].text_content().split())
    for page, record in B._ledgers():
        for c in record['claims']: assert ' '.join(c['statement'].split())[:60] in text, (page.src, c['key'])
    for page in PAGES:
        if page.module and page.kind == 'chapter' and page.module.split('.')[-1] in B.papers(): assert page.module in {r['module'] for _, r in B._ledgers()}, f'{page.src} has saved no claims'

def test_errata_page_links_every_box(trees):
    t = trees['90_appendix/20_errata.ipynb']
    assert len(t.xpath('//div[contains(@class,"erratum")]')) == len(B._errata())
    for page, i, *_ in B._errata(): assert trees[page.src].xpath(f'//*[@id="erratum-{i}"]')

def test_api_index_names_what_the_library_exports(trees):
    names = {' '.join(a.text_content().split()) for a in trees['90_appendix/50_api.ipynb'].xpath('//td/a')}
    for module, (_, defs) in B._api().items(): assert {n for n, _ in defs} <= names, module

def test_readme_is_the_home_page(tmp_path):
    text = B.make_readme(tmp_path/'README.md')
    assert text == (ROOT/'README.md').read_text(encoding='utf-8'), 'README.md is stale: make export'
    assert all(s in text for s in ('make book', 'make test', 'pip install', 'colab.research.google.com')) and '.ipynb)' not in re.sub(r'\(https://colab[^)]*\)', '', text)

def test_search_index_covers_every_page(book):
    text = (book[0]/'search.js').read_text(encoding='utf-8')
    index = json.loads(text.removeprefix('tokbookIndex(').removesuffix(')'))
    assert {u.split('#')[0] for _, _, u, _ in index} == {p.out for p in PAGES}

# ---- commands

def notebook(path, *sources):
    import nbformat.v4 as v4
    nb = v4.new_notebook(cells=[v4.new_code_cell(s) for s in sources], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    path.write_text(json.dumps(nb)); return path

def test_outputs_are_saved_when_all_went_well_only(tmp_path):
    good = notebook(tmp_path/'good.ipynb', 'import os\nos.environ["TOKBOOK_SIZE"], os.environ["TOKBOOK_STATIC"]', '#| eval: false\n1/0')
    B._execute(good, 'ci'); nb = json.loads(good.read_text())
    assert "('ci', '1')" in ''.join(nb['cells'][0]['outputs'][0]['data']['text/plain']) and nb['cells'][0]['execution_count'] is None
    assert B.outputs_fresh(nb, 'ci') and not B.outputs_fresh(nb, 'book') and 'tags' not in nb['cells'][1]['metadata']
    bad = notebook(tmp_path/'bad.ipynb', 'print("half")', '1/0'); before = bad.read_text()
    with pytest.raises(Exception, match='ZeroDivisionError'): B._execute(bad, 'ci')
    assert bad.read_text() == before

def test_serve_says_where(book):
    p = subprocess.Popen([sys.executable, '-u', '-m', 'tokbook.book', 'serve', '--out', str(book[0]), '--port', '0'], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r'http://\S+', p.stdout.readline())[0]
        assert b'<title>tokbook</title>' in urllib.request.urlopen(url, timeout=20).read()
    finally: p.terminate(); p.wait(20)

# ---- in a browser

def browser_missing():
    chrome = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if not chrome: return None, 'no Chromium on the path'
    if not shutil.which('node'): return None, 'no node on the path'
    if not (ROOT/'tests/web/node_modules/axe-core').is_dir(): return None, 'axe-core is not installed: cd tests/web && npm install --no-package-lock'
    return chrome, ''

def test_in_a_browser(book):
    "No accessibility violation (axe-core: WCAG 2 A and AA, contrast included), no horizontal scrolling, at desktop width in light and on a phone in dark; search and colors work; the page needs no script."
    chrome, why = browser_missing()
    if why: print(f'the browser tests did not run: {why}'); pytest.skip(why)
    r = subprocess.run(['node', 'check.mjs', str(book[0]), chrome, *(p.out for p in PAGES if (book[0]/p.out).exists())], cwd=ROOT/'tests'/'web', capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, r.stderr[-3000:]
    said = json.loads(r.stdout); b = said['behavior']
    assert not said['errors'] and not said['requests'], said
    assert not said['overflow'], '\n'.join(said['overflow'])
    assert not said['axe'], '\n'.join(said['axe'])
    assert any('claims' in h for h in b['hits']), b['hits']
    light, dark, again = b['theme']; assert light != dark == again
    assert b['noscript']['after'] and not b['noscript']['before'] and b['noscript']['text'] > 300
