"Sampling kernels against float64 references on random shapes, dtypes, layouts, ties and magnitudes; see kernel_tools.py for how both implementations are tested."
import math, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings, strategies as st
from kernel_tools import IMPL, INTERPRETED, U, cases, cubin, dtypes, interpret, lay, layouts, randn, seeds, size
from tokbook.kernels import ByteBins, byte_marginal, mix_rows, sample_mix, sample_token, scan_logits
from tokbook.kernels.sampling import ROUNDS, _bins_grad_op, _bins_op, _draw_op, _mix_op, _scan_op
from tokbook.lm import filter_logits

KW = dict(impl=IMPL)
if INTERPRETED: cases = settings(cases, max_examples=6, phases=[Phase.explicit, Phase.generate]) # hundreds of programs a row: each is slow here
few = st.one_of(size(300), st.sampled_from([1023, 1500] if INTERPRETED else [1023, 4097, 9000]))

def logits(n, v, seed, dtype, layout, grid=False, holes=0., power=0): # rows of scores; on a grid: many ties; holes: -inf
    z = randn(n, v, seed=seed)*3
    if grid: z = z.round()
    g = torch.Generator().manual_seed(seed + 1)
    z = z.masked_fill(torch.rand(n, v, generator=g) < holes, -math.inf)
    if n: z[:, torch.randint(v, (1,), generator=g)] = 1. # at least one is finite
    return lay((z.double()*10.**(0 if dtype == torch.float16 else power)).to(dtype), layout)

def ranked(z): # float64 (n, v) -> ids by value, then lowest index
    return torch.tensor([sorted(range(z.shape[1]), key=lambda i: (-r[i], i)) for r in z.tolist()]).view(z.shape)

def kept(z, t, top_k, top_p, min_p): # float64, by the book: which tokens stay, and which are too close to the edge of a filter to say
    n, v = z.shape
    order, sure = ranked(z), torch.ones(n, v, dtype=torch.bool)
    stays = z > -math.inf
    for r in range(n):
        x = z[r][order[r]]
        ok, unsure = x > -math.inf, torch.zeros(v, dtype=torch.bool)
        if top_k is not None: ok &= x >= x[min(top_k, v) - 1]
        w = ((x - x[0])/t).exp()*ok
        before = (w.cumsum(0) - w)/w.sum()
        if top_p is not None: unsure |= (before - top_p).abs() < 2**-19; ok &= before < top_p
        if min_p: unsure |= (w/min_p - 1).abs() < 2**-16; ok &= w >= min_p
        stays[r, order[r]], sure[r, order[r]] = ok, ~unsure
    return stays, sure

# --- scan_logits

@cases
@example(n=0, v=3, k=2, dtype=torch.float32, layout='plain', grid=False, holes=0., power=0, t=1., seed=0)
@example(n=2, v=300, k=128, dtype=torch.float32, layout='plain', grid=True, holes=.9, power=0, t=1., seed=0)
@given(n=size(5), v=few, k=st.sampled_from([1, 2, 5, 8, 30]), dtype=dtypes, layout=layouts, grid=st.booleans(), holes=st.sampled_from([0., 0., .5, .99]), power=st.sampled_from([0, 0, -30, -3, 1, 30]),
       t=st.sampled_from([1., .5, 1e-4, 3.]), seed=seeds)
def test_scan(n, v, k, dtype, layout, grid, holes, power, t, seed):
    z, k = logits(n, v, seed, dtype, layout, grid, holes, power), min(k, v)
    s = scan_logits(z, k, temperature=t, **KW)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    assert s.values.shape == s.ids.shape == (n, k) and s.logsumexp.shape == s.entropy.shape == (n,) and s.values.dtype == s.entropy.dtype == out and s.ids.dtype == torch.int64
    if not n: return
    d = z.double()
    assert torch.equal(s.ids, ranked(d)[:, :k]) and torch.equal(s.values.double(), d.gather(1, s.ids)) # exact, ties by index
    x = (d - d.amax(1, keepdim=True))/t
    lse = x.logsumexp(1)
    p = (x - lse[:, None]).exp()
    h, spread = lse - torch.where(p > 0, p*x, 0.).sum(1), torch.where(p > 0, p*x*x, 0.).sum(1)
    lse = lse + d.amax(1)/t
    allowed = 16*U*(4 + spread)
    assert ((s.entropy - h).abs() <= allowed + 16*U*lse.abs()*(power == 0)).all(), ((s.entropy - h).abs()/allowed).max()
    big = lse.abs() > 1e38 # beyond fp32
    assert ((s.logsumexp - lse).abs() <= 16*U*(4 + lse.abs() + spread))[~big].all()
    again = scan_logits(z, k, temperature=t, **KW)
    assert all(map(torch.equal, s, again))

@pytest.mark.parametrize('bad', [math.nan, -math.nan, math.inf])
def test_broken_rows(bad):
    z, b = randn(4, 600, seed=0), ByteBins(torch.arange(600) % 257)
    good = _scan_op(z, 3, 1., INTERPRETED)
    z[1, 577], z[3] = bad, -math.inf
    values, ids, lse, h = _scan_op(z, 3, 1., INTERPRETED) # what a GPU runs, where values are not looked at
    for i in (1, 3): assert (ids[i] == -1).all() and values[i].isnan().all() and lse[i].isnan() and h[i].isnan()
    for i in (0, 2): assert torch.equal(ids[i], good[1][i]) and torch.equal(h[i], good[3][i])
    u = torch.rand(4, ROUNDS, dtype=torch.float64)
    for args in ((0, 1., math.inf, 0.), (5, .7, math.inf, 0.), (0, 1., .5, .01)):
        ids = _draw_op(z, u, *args, INTERPRETED)
        assert (ids[[1, 3]] == -1).all() and (ids[[0, 2]] >= 0).all()
    out = _bins_op(z, b.tensors(), INTERPRETED)
    assert out[1, 577 % 257].isnan() and out[[0, 2]].isfinite().all() and (out[3] == -math.inf).all() and out[1].isnan().sum() == 1
    for f in (lambda: scan_logits(z, 3), lambda: sample_token(z, top_p=.9), lambda: sample_token(z, temperature=0), lambda: byte_marginal(z, b), lambda: sample_mix(z, randn(600, 4, seed=1))):
        with pytest.raises(ValueError, match='NaN or'): f()

def test_signs_of_zero_tie():
    z = torch.tensor([[-0., 0., -0., -1.]])
    assert scan_logits(z, 3, **KW).ids.tolist() == [[0, 1, 2]] and scan_logits(-z, 4, **KW).ids.tolist() == [[3, 0, 1, 2]]
    assert sample_token(z, temperature=0, **KW).item() == 0

@pytest.mark.skipif(INTERPRETED, reason='about large vocabularies: slow in the interpreter')
@pytest.mark.parametrize('v', [70_000, 300_000])
def test_large_vocabulary(v):
    z = (randn(2, v, seed=0)*4).round()/4 # ties in plenty
    want = torch.sort(z, dim=1, descending=True, stable=True)[1]
    for k in (1, 30, 200): assert torch.equal(scan_logits(z, k).ids, want[:, :k])

# --- sample_token

filters = dict(t=st.sampled_from([1., .5, 2.]), top_k=st.one_of(st.none(), st.integers(1, 40)), top_p=st.one_of(st.none(), st.sampled_from([.01, .3, .5, .9, 1.])), min_p=st.one_of(st.none(), st.sampled_from([.05, .5, 1.])))

@cases
@given(v=st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 130])), dtype=dtypes, grid=st.booleans(), holes=st.sampled_from([0., .5]), seed=seeds, **filters)
def test_kept_tokens(v, dtype, grid, holes, seed, t, top_k, top_p, min_p):
    "Rows that differ only in their uniform numbers: the tokens that come out are those of the filters, nothing else and none missing."
    n = 6 if INTERPRETED else 3000
    z = logits(1, v, seed, dtype, 'plain', grid, holes)
    stays, sure = kept(z.double(), t, top_k, top_p, min_p)
    if not min_p and dtype == torch.float32: # the same set as the sampler of the book, up to a rounding at the edge
        book = filter_logits(z, temperature=t, top_k=top_k, top_p=top_p) > -math.inf
        edge = (book != stays) & sure
        assert edge.sum() == 0
    ids = sample_token(z.expand(n, v), temperature=t, top_k=top_k, top_p=top_p, min_p=min_p, generator=torch.Generator().manual_seed(seed), **KW)
    seen = torch.bincount(ids, minlength=v)
    assert (stays | ~sure)[0][seen > 0].all()
    p = torch.where(stays, z.double()/t, -math.inf).softmax(1)[0]
    if not INTERPRETED: assert (seen > 0)[(p > .02) & sure[0]].all()
    if p.max() > .98: assert seen.argmax() == p.argmax()

@cases
@given(v=few, seed=seeds, dtype=dtypes, layout=layouts, u=st.floats(0, 1, exclude_max=True), t=st.sampled_from([1., .3]))
def test_inverse_of_the_cumulative_sum(v, seed, dtype, layout, u, t):
    "Without filters a draw is the place where the cumulative sum passes the uniform number."
    z = logits(3, v, seed, dtype, layout, holes=.3)
    i = _draw_op(z, torch.full((3, ROUNDS), u, dtype=torch.float64), 0, t, math.inf, 0., INTERPRETED)[:, None]
    p = (z.double()/t).softmax(1)
    c, err = p.cumsum(1), 2**-18
    assert (p.gather(1, i) > 0).all() and (c.gather(1, i) > u - err).all() and (c.gather(1, i) - p.gather(1, i) < u + err).all()

@pytest.mark.skipif(INTERPRETED, reason='thousands of draws: slow in the interpreter')
def test_frequencies():
    from scipy.stats import chi2
    n, z = 40_000, (randn(1, 200, seed=3)*.7).round(decimals=1)
    for kw in (dict(), dict(top_k=5), dict(top_p=.6), dict(top_p=.1), dict(min_p=.3, temperature=.8), dict(top_k=6, top_p=.8, min_p=.05)):
        stays, _ = kept(z.double(), kw.get('temperature', 1.), kw.get('top_k'), kw.get('top_p'), kw.get('min_p'))
        want = n*torch.where(stays, z.double()/kw.get('temperature', 1.), -math.inf).softmax(1)[0]
        seen = torch.bincount(sample_token(z.expand(n, -1), generator=torch.Generator().manual_seed(0), **kw, **KW), minlength=z.shape[1])
        assert (seen[want == 0] == 0).all()
        on = want > 0
        if on.sum() > 1: assert ((seen - want)**2/want)[on].sum() < chi2.isf(1e-6, int(on.sum()) - 1), kw

@pytest.mark.skipif(INTERPRETED, reason='about the public options')
@cases
@given(seed=seeds, min_p=st.floats(.001, 1.), top_p=st.floats(.05, 1.), k=st.integers(1, 40))
def test_filters_are_those_of_transformers(seed, min_p, top_p, k):
    lp = pytest.importorskip('transformers.generation.logits_process')
    z = randn(2, 40, seed=seed)*2
    want = z
    for w in (lp.TopKLogitsWarper(k), lp.TopPLogitsWarper(top_p), lp.MinPLogitsWarper(min_p)): want = w(None, want)
    m = sample_mix(z, torch.eye(40), top_k=k, top_p=top_p, min_p=min_p)
    assert (m.embedding - want.softmax(-1)).abs().max() < 1e-5
    stays, sure = kept(z.double(), 1., k, top_p, min_p)
    assert ((stays == (want > -math.inf)) | ~sure).all()

def test_seeds_and_devices_of_generators():
    z = randn(5, 300, seed=0)
    draw = lambda s: sample_token(z, top_p=.9, generator=torch.Generator().manual_seed(s), **KW)
    assert torch.equal(draw(0), draw(0)) and any(not torch.equal(draw(0), draw(s)) for s in range(1, 5))
    state = torch.get_rng_state(); draw(1); assert torch.equal(state, torch.get_rng_state())
    whole = torch.rand(5, ROUNDS, dtype=torch.float64)
    one = [_draw_op(z[i:i + 1], whole[i:i + 1], 0, 1., .8, 0., INTERPRETED) for i in range(5)]
    assert torch.equal(torch.cat(one), _draw_op(z, whole, 0, 1., .8, 0., INTERPRETED)) # a row does not depend on its batch
    assert (draw(0) == sample_token(z, top_p=.9, generator=torch.Generator().manual_seed(0), impl='torch')).all() # both implementations, the same tokens

# --- mix_rows, sample_mix

@cases
@example(r=0, n=3, v=5, d=4, dtype=torch.float32, layout='plain', seed=0)
@given(r=size(5 if INTERPRETED else 20), n=st.integers(1, 12), v=size(40), d=st.one_of(size(40), st.just(1030)), dtype=dtypes, layout=layouts, seed=seeds)
def test_mix(r, n, v, d, dtype, layout, seed):
    w, ids, table = randn(r, n, seed=seed), torch.randint(v, (r, n), generator=torch.Generator().manual_seed(seed)), lay(randn(v, d, seed=seed + 1).to(dtype), layout)
    out = mix_rows(w, ids, table, **KW)
    assert out.shape == (r, d) and out.dtype == (torch.float64 if dtype == torch.float64 else dtype)
    each = w.double()[:, :, None]*table.double()[ids]
    last = torch.finfo(dtype).eps/2
    assert ((out.double() - each.sum(1)).abs() <= (n + 2)*U*each.abs().sum(1) + 1.01*last*each.sum(1).abs() + torch.finfo(dtype).smallest_normal).all()

@cases
@given(v=few, d=size(20), dtype=dtypes, seed=seeds, n=st.one_of(st.none(), st.integers(1, 12)), t=st.sampled_from([1., .6]), top_k=st.sampled_from([1, 2, 10, 30]), top_p=st.one_of(st.none(), st.sampled_from([.3, .95])), min_p=st.one_of(st.none(), st.just(.01)))
def test_sample_mix(v, d, dtype, seed, n, t, top_k, top_p, min_p):
    z, e = logits(3, v, seed, dtype, 'plain'), randn(v, d, seed=seed).to(dtype)
    m = sample_mix(z, e, temperature=t, top_k=top_k, top_p=top_p, min_p=min_p, n=n, **KW)
    k = min(top_k, v)
    order = ranked(z.double())[:, :k] # exactly k, whatever ties
    x = z.double().gather(1, order)
    stays, sure = kept(x, t, None, top_p, min_p)
    if not sure.all(): return
    p = torch.where(stays, x/t, -math.inf).softmax(1)[:, :min(n or k, k)]
    p = p/p.sum(1, keepdim=True)
    assert torch.equal(m.ids, order[:, :p.shape[1]]) and (m.probs - p).abs().max() < 1e-5
    want = (m.probs.double()[:, :, None]*e.double()[m.ids]).sum(1)
    assert m.embedding.dtype == dtype and (m.embedding.double() - want).abs().max() < 4*torch.finfo(dtype).eps*max(1., want.abs().max()) + 40*U*e.abs().max()
    full = (z.double()/t).softmax(1)
    assert (m.entropy + torch.where(full > 0, full*full.log(), 0.).sum(1)).abs().max() < 1e-4

def test_gradients():
    z, e = randn(3, 200, seed=0), randn(200, 8, seed=1)
    def loss(z, e, impl):
        m = sample_mix(z, e, temperature=.7, top_k=20, top_p=.9, n=8, noise='gumbel', noise_scale=.5, generator=torch.Generator().manual_seed(0), impl=impl)
        return m.embedding.square().sum() + (m.entropy*torch.arange(3)).sum() + scan_logits(z, 3, impl=impl).logsumexp.sum()
    grads = []
    for impl in (IMPL, 'torch'):
        a, b = z.clone().requires_grad_(), e.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(a, b, impl), (a, b)))
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    z64, e64 = z.double().requires_grad_(), e.double().requires_grad_()
    if not INTERPRETED:
        dense = lambda z: -((p := (z/.7).softmax(-1))*p.log()).sum(-1) # the entropy, written out
        a, = torch.autograd.grad(scan_logits(z64, 1, temperature=.7).entropy.square().sum(), z64); b, = torch.autograd.grad(dense(z64).square().sum(), z64)
        torch.testing.assert_close(a, b)
        q = z64.detach()[:, :20].clone().requires_grad_()
        a, = torch.autograd.grad((sample_mix(q, e64[:20], top_k=20).embedding**3).sum(), q); b, = torch.autograd.grad(((q.softmax(-1) @ e64[:20])**3).sum(), q)
        torch.testing.assert_close(a, b) # nothing filtered: softmax(z) @ E

@pytest.mark.skipif(INTERPRETED, reason='about the noise, which is the same for both')
def test_noise_laws():
    from scipy.stats import chi2
    n, z, e = 40_000, torch.tensor([.4, .3, .2, .06, .04]).log(), torch.eye(5)
    g = torch.Generator().manual_seed(0)
    m = sample_mix(z.expand(n, 5), e, top_k=4, noise='gumbel', noise_scale=.3, generator=g)
    want = n*torch.tensor([.4, .3, .2, .06, 0.])/.96
    seen = torch.bincount(m.ids[:, 0], minlength=5)
    assert seen[4] == 0 and ((seen - want)**2/want)[:4].sum() < chi2.isf(1e-6, 3) # slot 0 is a draw from p, at any Gumbel temperature
    for alpha in (.3, 4.):
        x = sample_mix(z.expand(n, 5), e, top_k=5, noise='dirichlet', noise_scale=alpha, generator=g).embedding
        p = z.exp(); var = p*(1 - p)/(alpha + 1)
        assert ((x.mean(0) - p).abs() < 5*(var/n).sqrt()).all() and ((x.var(0)/var - 1).abs() < .1).all() and x.isfinite().all()
    tiny = sample_mix(z.expand(2000, 5), e, top_k=5, noise='dirichlet', noise_scale=1e-4, generator=g) # gammas far below the smallest float
    assert tiny.probs.isfinite().all() and tiny.probs[:, 0].min() > .5
    x = sample_mix(z.expand(n, 5), e, top_k=5, noise='gaussian', noise_scale=.5, generator=g).embedding - z.exp()
    assert (x.mean(0).abs() < 5*.5/n**.5).all() and ((x.std(0) - .5).abs() < .02).all()
    assert sample_mix(z, e, noise='gumbel', noise_scale=1e-4, generator=g).probs[0] > .999 # towards one-hot
    logit = z.double().clone().requires_grad_() # the mean of Dir(alpha p) is p: so is the mean of its gradient
    x = sample_mix(logit.expand(n, 5), e.double(), top_k=5, noise='dirichlet', noise_scale=4., generator=g).embedding
    got, = torch.autograd.grad(x[:, 0].mean(), logit)
    p = z.exp().double(); want = p[0]*(torch.eye(5)[0] - p)
    assert (got - want).abs().max() < .01

# --- byte_marginal

def by_byte(z, first): # float64 (n, v) -> (n, 257)
    return torch.stack([z.double()[:, first == b].logsumexp(1) if (first == b).any() else torch.full((len(z),), -math.inf, dtype=torch.float64) for b in range(257)], 1)

@cases
@example(n=0, v=5, bytes=3, dtype=torch.float32, layout='plain', holes=0., power=0, low=0., seed=0)
@given(n=size(3 if INTERPRETED else 6), v=few, bytes=st.sampled_from([1, 2, 30, 257]), dtype=dtypes, layout=layouts, holes=st.sampled_from([0., .3, .99]), power=st.sampled_from([0, -30, 1, 30]), low=st.sampled_from([0., -90., -1000.]), seed=seeds)
def test_bytes(n, v, bytes, dtype, layout, holes, power, low, seed):
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(257 - bytes, 257, (v,), generator=g)
    z = logits(n, v, seed, dtype, layout, holes=holes, power=power)
    z = torch.where(first == 256, z + low, z).to(dtype)
    bins = ByteBins(first)
    out = byte_marginal(z, bins, normalize=False, **KW)
    assert out.shape == (n, 257) and out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if not n: return
    want = by_byte(z, first)
    assert torch.equal(out == -math.inf, want == -math.inf)
    on = want > -math.inf
    assert ((out - want).abs() <= 16*U*(8 + want.abs()))[on].all()
    p = byte_marginal(z, bins, **KW)
    if power < 30: assert ((p - (want - want.logsumexp(1, keepdim=True))).abs() <= 16*U*(8 + want.abs() + want.amax(1, keepdim=True).abs() + (want - want.logsumexp(1, keepdim=True)).abs()))[on].all()
    assert torch.equal(out, byte_marginal(z, bins, normalize=False, **KW))

def test_bytes_gradient():
    first, z = torch.tensor([3, 3, 9, 256, 3, 9, 200, 200]), randn(4, 8, seed=0)
    z[0, [2, 5]] = -math.inf # a bin without a finite logit
    bins, grads = ByteBins(first), []
    for f in (lambda z: byte_marginal(z, bins, **KW), lambda z: (z - z.logsumexp(1, keepdim=True) @ torch.ones(1, 8, dtype=z.dtype))):
        x = (z if len(grads) == 0 else z.double()).clone().requires_grad_()
        y = f(x)
        if len(grads): y = torch.stack([y[:, first == b].logsumexp(1) for b in (3, 256, 200)], 1)
        else: y = y[:, [3, 256, 200]]
        grads.append(torch.autograd.grad((y*torch.tensor([1., 2., -3.])).sum(), x)[0].double())
    assert grads[0].isfinite().all(); torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    if not INTERPRETED:
        some = ByteBins(torch.randint(250, 257, (30,), generator=torch.Generator().manual_seed(0)))
        assert torch.autograd.gradcheck(lambda z: byte_marginal(z, some)[:, 250:], randn(2, 30, seed=1).double().requires_grad_())

def test_bytes_extremes():
    bins = ByteBins(torch.tensor([7, 7, 8, 9]))
    z = torch.tensor([[3e38, 3e38, -3e38, 0.], [-3e38, -3e38, -3e38, -3e38]])
    out = byte_marginal(z, bins, normalize=False, **KW)
    assert torch.equal(out[:, [7, 8, 9]], z[:, [0, 2, 3]]) # log 2 is lost in 3e38, nothing else
    everything = ByteBins(torch.arange(257)) # a byte tokenizer: the marginal is the model
    z = randn(3, 257, seed=0)
    torch.testing.assert_close(byte_marginal(z, everything, **KW), z.log_softmax(-1), rtol=0, atol=1e-6)
    same = bins.to('cpu'); assert same is bins and len(same) == 4

# --- operators

def test_operators_are_registered_well():
    z, e, k = randn(3, 90, seed=0), randn(90, 6, seed=1), INTERPRETED
    w, ids, bins = torch.rand(3, 5), torch.randint(90, (3, 5)), ByteBins(torch.arange(90) % 70)
    grad = lambda x: x.clone().requires_grad_()
    for op, args in [(_scan_op, (grad(z), 4, .7, k)), (_mix_op, (grad(w), ids, grad(e), k)), (_bins_op, (grad(z), bins.tensors(), k)), (_bins_grad_op, (z, torch.rand(3, 257), torch.rand(3, 257), bins.first_byte, k)),
                     (_draw_op, (z, torch.rand(3, ROUNDS, dtype=torch.float64), 3, 1., .9, 0., k))]: torch.library.opcheck(op, args)

@pytest.mark.skipif(INTERPRETED, reason='the graph is the same for both')
def test_compiles_without_a_graph_break():
    bins = ByteBins(torch.arange(90) % 70)
    def step(z, e):
        m = sample_mix(z, e, top_k=8, top_p=.9, min_p=.01, n=5, temperature=.6)
        return m.embedding.square().sum() + m.entropy.sum() + byte_marginal(z, bins)[:, :9].sum(), (m.ids, sample_token(z, temperature=0), scan_logits(z, 3).values)
    args, results = (randn(3, 90, seed=0).requires_grad_(), randn(90, 6, seed=1).requires_grad_()), []
    for f in (step, torch.compile(step, fullgraph=True, backend='aot_eager')):
        y, rest = f(*args)
        results.append([y, *rest, *torch.autograd.grad(y, args)])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    sampled = torch.compile(lambda z: sample_token(z, top_k=5, top_p=.9), fullgraph=True, backend='aot_eager')(args[0])
    assert (args[0].gather(1, sampled[:, None]) >= args[0].topk(5).values[:, -1:]).all()

@pytest.mark.skipif(INTERPRETED, reason='about the torch implementation')
def test_no_table_in_memory():
    "Peak memory beyond inputs, in a fresh process: a small part of the logits, while the eager forms are seen to hold copies of them."
    script = """
import torch
from tokbook.bench import CASES, peak_bytes
for name, contender in [('sample_mix', 'tokbook'), ('sample_token', 'tokbook'), ('byte_marginal', 'tokbook'), ('sample_token', 'sort, eager')]:
    make, sizes = CASES[name][0], dict(n=64, t=100_000, **dict(sample_mix=dict(d=8), sample_token=dict(top_p=.9)).get(name, {}))
    make('cpu', **{**sizes, 't': 1000})[0][contender]() # loads libraries
    print(peak_bytes(make('cpu', **sizes)[0][contender]))
"""
    mix, token, marginal, eager = map(int, subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split())
    table = 4*64*100_000
    assert eager > 2*table # the measurement sees it
    assert max(mix, token, marginal) < table/3

def test_bad_arguments():
    z, e = randn(2, 50, seed=0), randn(50, 4, seed=1)
    for f in (lambda: scan_logits(z, 0), lambda: scan_logits(z, 51), lambda: scan_logits(z, 3, temperature=math.nan), lambda: scan_logits(z, 3, impl='cuda'), lambda: sample_token(z, temperature=math.inf, top_k=.5), lambda: sample_mix(z, e, noise='gumbel', noise_scale=0.),
              lambda: sample_mix(z[:, :40], e), lambda: mix_rows(z, torch.zeros(2, 50).long() - 1, e), lambda: ByteBins(torch.tensor([-1])), lambda: ByteBins(torch.zeros(0).long()), lambda: byte_marginal(z, ByteBins(torch.zeros(49).long()))):
        with pytest.raises(ValueError): f()
    for f in (lambda: scan_logits(z.long(), 2), lambda: scan_logits([1.], 1), lambda: sample_token(z, top_p='all'), lambda: byte_marginal(z, torch.zeros(50).long()), lambda: mix_rows(z, z, e)):
        with pytest.raises(TypeError): f()
    if INTERPRETED:
        with pytest.raises(ValueError, match='k must lie'): scan_logits(randn(1, 300, seed=0), 129, impl='triton')
        with pytest.raises(ValueError, match='top_k must lie'): sample_token(randn(1, 300, seed=0), top_k=129, impl='triton')

# --- Triton

@pytest.mark.skipif(INTERPRETED, reason='starts this process')
def test_triton(): interpret(__file__)

@pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')
def test_kernels_compile_for_a_gpu():
    pytest.importorskip('triton')
    from tokbook.kernels import sampling as s
    f32, f64, i32, i64, bf16, x32 = '*fp32', '*fp64', '*i32', '*i64', '*bf16', 'i32'
    for z in (f32, bf16):
        cubin(s._scan_kernel, dict(z_ptr=z, top_ptr=f32, part_ptr=f32, v=x32, groups=x32, inv_t='fp32'), num_warps=8, GROUP=64, BG=64, STEPS=4)
        cubin(s._rank_kernel, dict(z_ptr=z, top_ptr=f32, part_ptr=f32, value_ptr=f32, id_ptr=i64, lse_ptr=f32, entropy_ptr=f32, v=x32, groups=x32, parts=x32, k=x32, inv_t='fp32'), num_warps=8, GROUP=64, NG=4096, NP=16, K=32)
        for topk, some in ((False, True), (True, False)):
            cubin(s._draw_kernel, dict(z_ptr=z, kth_ptr=f32, u_ptr=f64, id_ptr=i64, v=x32, inv_t='fp32', top_p='fp32', min_p='fp32'), num_warps=8, ROUNDS=ROUNDS, BV=4096, TOPK=topk, FILTER=some)
        cubin(s._mix_kernel, dict(w_ptr=f32, id_ptr=i64, e_ptr=z, out_ptr=z, n=x32, d=x32), BD=1024)
        cubin(s._chunk_kernel, dict(z_ptr=z, order_ptr=i32, edge_ptr=i32, m_ptr=f32, s_ptr=f32, n=x32, v=x32), num_warps=8, BR=4, BC=1024)
        assert 'atom' not in cubin(s._bins_grad_kernel, dict(z_ptr=z, lse_ptr=f32, g_ptr=f32, byte_ptr=i32, dz_ptr=z, v=x32), BYTES=257, BV=1024)
    cubin(s._join_kernel, dict(m_ptr=f32, s_ptr=f32, first_ptr=i32, out_ptr=f32, chunks=x32), num_warps=1, BYTES=257, BB=32, BC=4)
