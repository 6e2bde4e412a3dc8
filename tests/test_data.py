"""Data: exact laws against independent computations, splits that share nothing, downloads that fail properly."""
import hashlib, http.server, itertools, math, os, subprocess, sys, threading, types
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
import tokbook.data as data
from tokbook.data import MarkovSource, PictureFolder, corpus, digits, download, english, image_crops, photos, pictures, test_region as region

torch.set_num_threads(1)
some = settings(max_examples=30, deadline=None, derandomize=True)
orders = st.sampled_from([(2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (4, 1), (5, 2)])

def table(seed, A, k, sparse=0.):
    g = torch.Generator().manual_seed(seed); P = torch.rand(A**k, A, generator=g, dtype=torch.float64)**3 + 1e-3
    P = P*(torch.rand(P.shape, generator=g) >= sparse); P[P.sum(1) == 0, 0] = 1
    return P/P.sum(1, keepdim=True)

def transition(P): # dense, by enumeration of contexts as tuples
    S, A = P.shape; k = round(math.log(S)/math.log(A)); ctx = list(itertools.product(range(A), repeat=k)); at = {c: i for i, c in enumerate(ctx)}
    T = np.zeros((S, S))
    for c in ctx:
        for x in range(A): T[at[c], at[(*c, x)[1:]]] += P[at[c], x]
    return T

# ---- Markov sources ----
@some
@given(st.integers(0, 10**6), orders)
def test_stationary_is_the_long_run(seed, Ak):
    P = table(seed, *Ak); pi = MarkovSource(P, Ak[1]).stationary()
    far = np.linalg.matrix_power(transition(P.numpy()), 1 << 14) # every row of T^n tends to pi
    assert np.abs(far - pi.numpy()).max() < 1e-9

@some
@given(st.integers(0, 10**6), orders, st.floats(.3, .8))
def test_ergodic_means_one_closed_class(seed, Ak, sparse):
    from scipy.sparse.csgraph import connected_components
    P = table(seed, *Ak, sparse); T = transition(P.numpy()) > 0
    n, label = connected_components(T, directed=True, connection='strong')
    closed = sum(not T[label == i][:, label != i].any() for i in range(n))
    src = MarkovSource(P, Ak[1])
    if closed == 1:
        pi = src.stationary().numpy(); assert np.abs(pi @ transition(P.numpy()) - pi).max() < 1e-12 and abs(pi.sum() - 1) < 1e-12; src.sample(2, 20)
    else:
        for f in (src.stationary, src.entropy_rate, lambda: src.sample(1, 3), lambda: src.block_entropy(2), lambda: src.log_prob(torch.zeros(1, 2).long())):
            with pytest.raises(ValueError, match='ergodic'): f()

@some
@given(st.integers(0, 10**6), st.sampled_from([(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]), st.floats(0, .3))
def test_log_prob_sums_to_one_and_gives_the_block_entropy(seed, Ak, sparse):
    A, k = Ak; src = MarkovSource(table(seed, A, k, sparse), k)
    try: src.stationary()
    except ValueError: assume(False)
    for r in range(1, 6):
        lp = src.log_prob(torch.tensor(list(itertools.product(range(A), repeat=r)))); p = lp.exp()
        assert abs(p.sum() - 1) < 1e-10
        assert abs(-(p[p > 0]*lp[p > 0]).sum() - src.block_entropy(r)) < 1e-10
    assert abs(src.block_entropy(9) - src.block_entropy(8) - src.entropy_rate()) < 1e-10

@some
@given(st.floats(.02, .98), st.floats(.02, .98), st.integers(1, 5), st.integers(1, 12))
def test_switching_is_its_closed_form(p, q, k, r):
    s, h = MarkovSource.switching(p, q, k), lambda a: -a*math.log(a) - (1 - a)*math.log(1 - a)
    rate, unit = (q*h(p) + p*h(q))/(p + q), h(p/(p + q))
    assert abs(s.entropy_rate() - rate) < 1e-12 and abs(s.block_entropy(r) - min(r, k)*unit - max(r - k, 0)*rate) < 1e-10
    general = MarkovSource(s.P, k); x = torch.randint(2, (4, 9)); assert (s.log_prob(x) - general.log_prob(x)).abs().max() < 1e-9
    lag = MarkovSource([[1 - p, p], [q, 1 - q]]) # interleaved: one chain per residue
    assert (s.log_prob(x) - sum(lag.log_prob(x[:, i::k]) for i in range(min(k, 9)))).abs().max() < 1e-9

@pytest.mark.parametrize('make', [lambda: MarkovSource.switching(.8, .7, 3), lambda: MarkovSource(MarkovSource.switching(.8, .7, 3).P, 3), lambda: MarkovSource(table(1, 3, 2, .3), 2), lambda: MarkovSource(table(2, 4, 4), 4)])
@pytest.mark.parametrize('n, length', [(1, 30_000), (3, 10_000), (3000, 10)]) # each takes another way through the sampler
def test_samples_follow_the_law(make, n, length):
    src = make(); x = src.sample(n, length, torch.Generator().manual_seed(0)); r = src.order + 1
    assert x.shape == (n, length) and x.dtype == torch.int64
    windows = x.unfold(1, r, 1).reshape(-1, r); code = (windows*src.A**torch.arange(r).flip(0)).sum(1)
    got = torch.bincount(code, minlength=src.A**r).double(); want = (src.stationary()[:, None]*src.P).flatten()
    assert (got[want == 0] == 0).all() # the impossible never happens
    assert (got/got.sum() - want).abs().sum() < 6*(want*(1 - want)/len(code)).sqrt().sum() # total variation, generous for dependence
    rate = -src.log_prob(x).mean()/length
    assert abs(rate - src.block_entropy(length)/length) < .02

def test_sampler_seeds_and_leaves_the_global_state():
    s = MarkovSource.switching(.8, .8, 2); state = torch.get_rng_state(); g = lambda i: torch.Generator().manual_seed(i)
    assert torch.equal(s.sample(3, 5000, g(1)), s.sample(3, 5000, g(1))) and not torch.equal(s.sample(3, 5000, g(1)), s.sample(3, 5000, g(2)))
    assert torch.equal(state, torch.get_rng_state())

def test_edges():
    one = MarkovSource([[1.]]); assert one.entropy_rate() == 0 and one.sample(2, 5).eq(0).all()
    flip = MarkovSource.switching(1., 1.); x = flip.sample(5, 100); assert (x[:, 1:] != x[:, :-1]).all() and flip.entropy_rate() == 0
    with pytest.raises(ValueError, match='4096'): MarkovSource(torch.full((2**13, 2), .5), 13).stationary()
    for bad in (torch.ones(2, 2, 2)/2, torch.empty(0, 2)):
        with pytest.raises(ValueError): MarkovSource(bad)
    with pytest.raises(TypeError): MarkovSource(torch.eye(2).long())

# ---- pictures ----
@pytest.mark.parametrize('size', [1, 8, 32, 75])
def test_no_pixel_is_in_both_splits(monkeypatch, size):
    "Replace every picture by one whose colors are its coordinates, and look at which pixels the crops really show."
    shape = {n: data._picture(n).shape for n in data.PHOTOS + data.TEXTURES}
    def coordinates(name): i = torch.arange(shape[name][1]*shape[name][2]).view(shape[name][1:]); return torch.stack([i % 256, i//256 % 256, i//65536 + 10*list(shape).index(name)]).to(torch.uint8)
    monkeypatch.setattr(data, '_picture', coordinates)
    def seen(split): c = (image_crops(300, size, split=split, kind='mixed')*255).round().long(); return set((c[:, 0] + 256*c[:, 1] + 65536*c[:, 2]).flatten().tolist())
    train, test = seen('train'), seen('test'); assert not train & test and len(test) > 100
    assert {v//655360 for v in train} == {v//655360 for v in test} == set(range(10)) # every picture is in both

def test_crops_are_reproducible_and_leave_the_global_state():
    state = torch.get_rng_state(); a = image_crops(20, 16, seed=3); assert torch.equal(a, image_crops(20, 16, seed=3)) and torch.equal(state, torch.get_rng_state())
    assert a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
    a.zero_(); assert image_crops(20, 16, seed=3).std() > .1 # a caller who writes into the crops spoils nothing

@some
@given(st.integers(4, 200), st.integers(4, 200))
def test_region_is_one_cell_in_each_row(h, w):
    m = region(h, w); edges = [[-(-i*s//4) for i in range(5)] for s in (h, w)]
    cells = [[m[a:b, c:d] for c, d in itertools.pairwise(edges[1])] for a, b in itertools.pairwise(edges[0])]
    assert all(c.all() or not c.any() for row in cells for c in row) and all(sum(bool(c.all()) for c in row) == 1 for row in cells) and all(sum(bool(c.all()) for c in col) == 1 for col in zip(*cells))

def test_pictures_are_the_libraries_own():
    from sklearn.datasets import load_sample_image; from skimage.data import astronaut, coffee
    for x, y in ((photos()[0], load_sample_image('china.jpg')), (photos()[2], astronaut()), (photos()[4], coffee())):
        assert (x.permute(1, 2, 0)*255 - torch.tensor(y)).abs().max() < 2 # JPEG decoders may round differently

def test_digits_cover_the_set_once():
    from sklearn.datasets import load_digits
    (a, la), (b, lb) = digits(), digits('test'); d = load_digits()
    assert np.allclose(torch.cat([a, b])[:, 0]*16, d.images) and (torch.cat([la, lb]).numpy() == d.target).all() and lb.unique().numel() == 10

# ---- English ----
def test_english_is_the_same_in_every_process():
    out = subprocess.run([sys.executable, '-c', "import hashlib; from tokbook.data import english; print(hashlib.sha256((english() + english('test')).encode()).hexdigest())"],
                         env=os.environ | dict(PYTHONHASHSEED='7'), capture_output=True, text=True, check=True, cwd=Path(data.__file__).parent.parent).stdout
    assert out == hashlib.sha256((english() + english('test')).encode()).hexdigest() + '\n'

def test_english_splits_share_no_sentence_of_length():
    train, test = english(min_chars=300_000), english('test', min_chars=20_000)
    cut = lambda t: {s for p in t.split('\n') for s in p.split('. ') if len(s) > 80}
    a, b = cut(train), cut(test); assert len(a & b) < .01*len(b), sorted(a & b)[:5] # docstrings quote each other now and then
    assert '\t' not in train and '  ' not in train and '>>>' not in train

# ---- downloads ----
class Handler(http.server.BaseHTTPRequestHandler):
    body, count = b'some tokens', 0
    def do_GET(self):
        Handler.count += 1
        if self.path.startswith('/missing'): return self.send_error(404)
        self.send_response(200); self.send_header('Content-Length', str(len(self.body)*(2 if self.path.startswith('/short') else 1))); self.end_headers(); self.wfile.write(self.body)
    def log_message(self, *a): pass

@pytest.fixture(scope='module')
def server():
    s = http.server.HTTPServer(('localhost', 0), Handler); t = threading.Thread(target=s.serve_forever, daemon=True); t.start()
    yield f'http://localhost:{s.server_port}'; s.shutdown(); s.server_close(); t.join()

def test_download_once_and_check(server, tmp_path):
    good = hashlib.sha256(Handler.body).hexdigest(); before = Handler.count
    for _ in range(3): f = download(f'{server}/a.txt?x=1', good, cache=tmp_path)
    assert f.read_bytes() == Handler.body and Handler.count == before + 1 and f.name.endswith('-a.txt')
    with pytest.raises(ValueError, match=good): download(f'{server}/b.txt', 'f'*64, cache=tmp_path)
    with pytest.raises(ValueError, match=good): download(f'{server}/a.txt?x=1', 'f'*64, cache=tmp_path) # a cached file is checked too
    assert f.read_bytes() == Handler.body # and a refused one does not replace it
    for path in ('short', 'missing'):
        with pytest.raises(ConnectionError, match=path): download(f'{server}/{path}.txt', cache=tmp_path)
    assert sorted(tmp_path.iterdir()) == [f] # no half files
    assert download(f'{server}/other/a.txt', cache=tmp_path) != f # same name, other address

def test_cache_folder_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TOKBOOK_CACHE', str(tmp_path/'c')); assert download(f'{server}/a.txt').parent == tmp_path/'c'

def test_wikitext_reads_fastais_files(monkeypatch, tmp_path):
    pytest.importorskip('fastai'); import fastai.data.external as ext
    (tmp_path/'train.csv').write_text('" = A = \n one, two"\n"three"\n'); (tmp_path/'test.csv').write_text('four\n'); asked = []
    monkeypatch.setattr(ext, 'untar_data', lambda url: asked.append(url) or tmp_path)
    assert corpus('wikitext-103') == ' = A = \n one, two\nthree' and corpus('wikitext-2', 'test') == 'four' and corpus('wikitext-103', max_chars=4) == ' = A'
    assert asked[0] == ext.URLs.WIKITEXT and asked[1] == ext.URLs.WIKITEXT_TINY
    def offline(url): raise OSError('no route')
    monkeypatch.setattr(ext, 'untar_data', offline)
    for f in (lambda: corpus('wikitext-2'), lambda: pictures('imagenette')):
        with pytest.raises(ConnectionError, match='fastai'): f()

def test_hub_corpus(monkeypatch):
    class Fake(list): column_names = ['text', 'id']
    asked = []; monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=lambda *a, **k: asked.append((a, k)) or Fake([dict(text=t) for t in ('one', 'two', 'three')])))
    assert corpus('someone/texts:raw', 'test', revision='abc') == 'one\ntwo\nthree' and asked == [(('someone/texts', 'raw'), dict(split='test', revision='abc'))]
    assert corpus('someone/texts', max_chars=5) == 'one\nt'
    with pytest.raises(ValueError, match='column'): corpus('someone/texts', column='body')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ImportError, match='datasets'): corpus('someone/texts')

def test_picture_folder_in_a_loader(tmp_path):
    from PIL import Image
    for c, col in (('a', (255, 0, 0)), ('b', (0, 255, 0))):
        (tmp_path/c).mkdir()
        for i in range(3): Image.new('L' if i == 2 else 'RGB', (9 + i, 30), 128 if i == 2 else col).save(tmp_path/c/f'{i}.png')
    x, y = next(iter(torch.utils.data.DataLoader(PictureFolder(tmp_path, 8), 6)))
    assert x.shape == (6, 3, 8, 8) and y.tolist() == [0, 0, 0, 1, 1, 1] and x[3, 1].min() > .99

# ---- drawn scenes ----
@pytest.mark.parametrize('kind', data.SCENE_KINDS)
def test_solids_against_marching(kind):
    "Where a ray enters a solid and which way the surface faces there, against small steps along the ray and a difference quotient of the solid's own inequality."
    g = torch.Generator().manual_seed(3); n = 400; rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    r, yaw = .2 + .3*rand(n, 1), 1.5*rand(n, 1); az, el = 6.28*rand(n, 1), .5 + .5*rand(n, 1)
    d = (az.cos()*el.cos(), az.sin()*el.cos(), -el.sin()); aim = [(2*rand(n, 1) - 1)*r*1.2, (2*rand(n, 1) - 1)*r*1.2, 2*rand(n, 1)*r]
    o = tuple(a - 3*q for a, q in zip(aim, d)); t, N = data._solid(kind, o, d, r, yaw)
    def level(x, y, z): # < 0 inside
        u, v = yaw.cos()*x + yaw.sin()*y, yaw.cos()*y - yaw.sin()*x; rho = (x*x + y*y).sqrt()
        if kind == 'ball': return (rho**2 + (z - r)**2).sqrt() - r
        if kind == 'cube': return torch.stack([u.abs() - .8*r, v.abs() - .8*r, (z - .8*r).abs() - .8*r]).amax(0)
        if kind == 'cone': return torch.maximum(rho - .48*(2*r - z), -z)
        return torch.stack([rho - .8*r, z - 1.7*r, -z]).amax(0)
    ts = torch.linspace(1.5, 4.5, 6001, dtype=torch.float64)[None]; inside = level(*(p + q*ts for p, q in zip(o, d))) < 0
    hit = inside.any(1); first = ts[0, inside.int().argmax(1)]; finite = t[:, 0].isfinite()
    assert (hit & ~finite).sum() == 0 and (finite & ~hit).sum() <= 3 and 100 < hit.sum() < 400 # a ray may cut a corner between two steps
    assert (t[hit, 0] - first[hit]).abs().max() < 1e-3
    p = [a + t*q for a, q in zip(o, d)]; h = 1e-6
    slope = torch.stack([(level(*(c + h*(i == k) for i, c in enumerate(p))) - level(*(c - h*(i == k) for i, c in enumerate(p))))/(2*h) for k in range(3)])
    cos = (torch.nn.functional.normalize(slope, dim=0)*torch.stack([c.expand(n, 1) for c in N])).sum(0)[:, 0]
    assert (cos[hit] > .999).float().mean() > .98 and torch.allclose(sum(c*c for c in N)[hit], torch.ones(1, dtype=torch.float64))

@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(4, 20), st.integers(1, 4), st.integers(0, 2), st.sampled_from(['train', 'test']))
def test_scenes_hold_together(seed, size, lo, more, split):
    S = data.scenes(20, size, objects=(lo, lo + more), seed=seed, split=split); again = data.scenes(20, size, objects=(lo, lo + more), seed=seed, split=split)
    assert all(torch.equal(v, getattr(again, k)) for k, v in vars(S).items() if k != 'captions') and S.captions == again.captions
    slot = torch.arange(lo + more)
    for k in (S.kinds, S.colors, S.sizes): assert torch.equal(k >= 0, slot < S.count[:, None])
    assert ((S.count >= lo) & (S.count <= lo + more)).all() and S.segments.max() <= lo + more
    assert torch.equal(S.kind_map() > 0, S.segments > 0) and S.depth.min() >= 0 and S.depth.max() <= 1 and not S.image.isnan().any()
    whole = S.boxes[..., 2:] >= S.boxes[..., :2]; assert whole.all() and (S.boxes[S.kinds < 0] == 0).all()
    with pytest.raises(ValueError, match='objects'): data.scenes(2, objects=(2, 1))
