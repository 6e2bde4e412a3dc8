"Kernels against float64 references on random shapes, dtypes, layouts and magnitudes; see kernel_tools.py for how both implementations are tested."
import math, os, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from hypothesis import example, given, strategies as st
from kernel_tools import IMPL, INTERPRETED, U, cases, cubin, dtypes, interpret, lay, layouts, randn, seeds, size
from tokbook.kernels import code_stats, energy_score, match_tokens, merge_groups, nearest_code, use_triton
from tokbook.kernels.merging import _energy_op, _match_op, _merge_op
from tokbook.kernels.nearest import _nearest_op, _prepare, _stats_op

def distances(z, e, metric): # (n, d), (k, d) -> (n, k) float64, by plain differences
    z, e = z.double(), e.double()
    if metric == 'euclidean': return torch.stack([((r - e)**2).sum(1) for r in z]) if len(z) else z.new_zeros(0, len(e))
    if metric == 'cosine': z, e = (x/x.norm(dim=1, keepdim=True).clamp_min(1e-300) for x in (z, e))
    return -(z @ e.T)

def allowed(z, e, metric): # (n,) the stated bound
    d, z, e = z.shape[1], z.double(), e.double()
    if metric == 'cosine': return torch.full((len(z),), 4*(d + 8)*U)
    if metric == 'dot': return 4*(d + 8)*U*z.norm(dim=1)*e.norm(dim=1).max()
    _, mu, g, _ = _prepare(e.float(), metric, torch.float32)
    c = (mu*g).double()
    return 4*(d + 8)*U*((z - c).norm(dim=1) + (e - c).norm(dim=1).max())**2

# --- nearest_code

@cases
@example(n=0, k=3, d=2, dtype=torch.float32, layout='plain', metric='euclidean', copies=0, shift=0, power=0, seed=0)
@given(n=size(140), k=size(150), d=st.one_of(st.sampled_from([1, 8, 16, 64, 130, 257]), st.integers(1, 40)),
       dtype=dtypes, layout=layouts, metric=st.sampled_from(['euclidean', 'cosine', 'dot']), copies=st.integers(0, 5), shift=st.sampled_from([0, 0, 1e3, 1e6]), power=st.sampled_from([0, 0, -30, -10, 10, 30]), seed=seeds)
def test_nearest(n, k, d, dtype, layout, metric, copies, shift, power, seed):
    if dtype == torch.float16: power = max(-2, min(power, 2)); shift = min(shift, 100)
    z, e = (((randn(m, d, seed=seed + i) + shift).double()*10.**power).to(dtype) for i, m in enumerate((n, k)))
    g = torch.Generator().manual_seed(seed)
    for _ in range(copies): e[torch.randint(k, (1,), generator=g)] = e[torch.randint(k, (1,), generator=g)]
    z, e = lay(z, layout), lay(e, layout) if layout != 'expanded' else e
    codes, dist = nearest_code(z, e, metric=metric, return_distance=True, impl=IMPL)
    assert codes.shape == dist.shape == (n,) and codes.dtype == torch.int64 and dist.dtype == torch.float32
    if not n: return
    assert 0 <= codes.min() and codes.max() < k
    full, pick = distances(z, e, metric), torch.arange(n)
    low = full.amin(1)
    assert (full[pick, codes] - low <= allowed(z, e, metric)).all()
    clear = full.masked_fill(full == low[:, None], math.inf).amin(1) - low > allowed(z, e, metric)
    same = (e[:, None] == e[None]).all(-1).float().argmax(1) # the first code equal to each
    assert (codes[clear] == full.argmin(1)[clear]).all() and (same[codes] == codes).all() # equal codes: the lowest index
    want = full[pick, codes].sqrt() if metric == 'euclidean' else full[pick, codes] + (metric == 'cosine')
    torch.testing.assert_close(dist, want.float(), rtol=1e-6, atol=1e-6 if metric == 'cosine' else min(1e30, float(want.abs().max())*1e-7)) # beyond fp32: infinite in both

@cases
@given(n=size(100), k=size(100), d=st.integers(1, 6), shift=st.sampled_from([0, 1000, -65536]), power=st.sampled_from([0, -60, 60]), seed=seeds)
def test_nearest_exact_on_a_grid(n, k, d, shift, power, seed):
    "Whole numbers of moderate size are compared without any rounding, so the many ties resolve exactly as in integer arithmetic."
    g = torch.Generator().manual_seed(seed)
    z, e = (torch.randint(-6, 7, (m, d), generator=g) + shift for m in (n, k))
    want = ((z[:, None] - e[None])**2).sum(-1)
    first = (want == want.amin(1, keepdim=True)).float().argmax(1)
    assert (nearest_code(z.float()*2.**power, e.float()*2.**power, impl=IMPL) == first).all()

@cases
@given(n=size(70), k=size(70), d=size(20), at=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), metric=st.sampled_from(['euclidean', 'cosine', 'dot']))
def test_nearest_refuses_nan_rows(n, k, d, at, bad, metric):
    z, e = randn(n, d, seed=at), randn(k, d, seed=at + 1)
    good = nearest_code(z, e, metric=metric, impl=IMPL)
    z[at % n, at % d] = bad
    codes, dist = nearest_code(z, e, metric=metric, return_distance=True, impl=IMPL)
    row = torch.arange(n) == at % n
    assert codes[row].item() == -1 and dist[row].isnan().all() and (codes[~row] == good[~row]).all() and dist[~row].isfinite().all()

def test_nearest_extremes():
    e = torch.tensor([[3e38, 0.], [-3e38, 0.], [0., 1e-38], [0., -1e-38]])
    z = torch.tensor([[1e38, 1e38], [2.9e38, 1.], [-2e38, 0.], [0., 0.]])
    codes, dist = nearest_code(z, e, return_distance=True, impl=IMPL)
    assert codes.tolist() == [2, 0, 1, 2] and dist.isfinite().all()
    tiny = torch.tensor([[1e-38], [3e-38]])
    assert nearest_code(tiny, tiny, impl=IMPL).tolist() == [0, 1]
    one_far = torch.cat([randn(50, 4, seed=0), torch.full((1, 4), 1e3)]) # an outlier among the codes does not spoil the others
    z = randn(200, 4, seed=1)
    assert (nearest_code(z, one_far, impl=IMPL) == distances(z, one_far, 'euclidean').argmin(1)).all()
    zeros = torch.zeros(3, 5)
    assert (nearest_code(torch.ones(2, 5), zeros, metric='cosine', impl=IMPL) == 0).all() and (nearest_code(zeros, zeros, impl=IMPL) == 0).all()

@pytest.mark.parametrize('zs,es', [((5,), (2, 3)), ((4, 5), (3,)), ((2, 4, 5), (4, 3)), ((2, 4, 5), (2, 1, 3)), ((2, 1, 5), (2, 3, 6)), ((1, 5), (3, 4)), ((3, 0), (3, 4)), ((0, 5), (3,))])
def test_nearest_heads(zs, es):
    z, e = randn(*zs, 7, seed=0), randn(*es, 7, seed=1)
    lead = torch.broadcast_shapes(zs[:-1], es[:-1])
    zb, eb = z.expand(*lead, zs[-1], 7), e.expand(*lead, es[-1], 7)
    codes, dist = nearest_code(z, e, return_distance=True, impl=IMPL)
    want = torch.cdist(zb.double(), eb.double()) # (..., n, k)
    assert codes.shape == (*lead, zs[-1]) and (not codes.numel() or ((codes == want.argmin(-1)).all() and torch.allclose(dist.double(), want.amin(-1))))

def test_nearest_ignores_autocast_and_gradients():
    z, e = (randn(300, 16, seed=i)*torch.logspace(0, 2, 16) + 50 for i in range(2))
    want = nearest_code(z, e, impl=IMPL)
    assert (torch.cdist(z.bfloat16().float(), e.bfloat16().float()).argmin(1) != want).any() # the case is one that bfloat16 gets wrong
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(nearest_code(z.requires_grad_(), e.requires_grad_(), impl=IMPL), want)

# --- code_stats

@cases
@example(h=0, n=0, k=3, d=2, dtype=torch.float32, layout='plain', skew=0., masked=False, seed=0)
@given(h=st.integers(0, 2), n=size(700), k=size(40), d=size(40), dtype=dtypes, layout=layouts, skew=st.sampled_from([0., .9, 1.]), masked=st.booleans(), seed=seeds)
@example(h=2, n=1500, k=3, d=5, dtype=torch.float32, layout='plain', skew=.9, masked=False, seed=0) # several chunks for one code
def test_code_stats(h, n, k, d, dtype, layout, skew, masked, seed):
    g, lead = torch.Generator().manual_seed(seed), (h,)*(h > 0)
    z = lay(randn(*lead, n, d, seed=seed).to(dtype), layout)
    codes = torch.randint(-1, k, (*lead, n), generator=g).where(torch.rand(*lead, n, generator=g) >= skew, k//2)
    mask = torch.rand(*lead, n, generator=g) > .3 if masked else None
    counts, sums = code_stats(z, codes, k, mask=mask, impl=IMPL)
    on = F.one_hot(codes.where(mask, -1) + 1 if masked else codes + 1, k + 1)[..., 1:].double()
    assert counts.dtype == sums.dtype == torch.float32 and torch.equal(counts.double(), on.sum(-2))
    assert ((sums - on.mT @ z.double()).abs() <= counts[..., None]*U*1.001*(on.mT @ z.double().abs())).all()
    again = code_stats(z, codes, k, mask=mask, impl=IMPL)
    assert torch.equal(counts, again[0]) and torch.equal(sums, again[1])

def test_code_stats_keeps_nan_in_its_code():
    z, codes = randn(60, 3, seed=0), torch.arange(60) % 4
    z[6] = math.nan
    sums = code_stats(z, codes, 4, impl=IMPL)[1]
    assert sums[2].isnan().all() and sums[[0, 1, 3]].isfinite().all()
    assert code_stats(z, codes.where(codes != 2, -1), 4, impl=IMPL)[1].isfinite().all() # a row that is left out does not leak

# --- energy_score, match_tokens

def cosines(a, b): # float64; a zero row has cosine 0 with everything
    a, b = (x.double()/x.double().norm(dim=-1, keepdim=True).clamp_min(1e-300) for x in (a, b))
    return a @ b.mT

@cases
@given(b=st.integers(1, 3), t=size(140), d=st.one_of(size(40), st.just(130)), dtype=dtypes, layout=layouts, margin=st.floats(-1, .9), alpha=st.sampled_from([1., .5, 0.]), kind=st.sampled_from(['elu', 'eq4', 'gaussian']),
       masked=st.booleans(), power=st.sampled_from([0, -30, 30]), seed=seeds)
def test_energy(b, t, d, dtype, layout, margin, alpha, kind, masked, power, seed):
    x = lay((randn(b, t, d, seed=seed).double()*10.**(0 if dtype == torch.float16 else power)).to(dtype), layout)
    x = torch.where(randn(b, t, 1, seed=seed + 1) > 1.8, 0, x).to(dtype) # some zero rows
    mask = randn(b, t, seed=seed + 2) > -.5 if masked else None
    out = energy_score(x, margin, alpha=alpha, kind=kind, mask=mask, impl=IMPL)
    assert out.shape == (b, t) and out.dtype == torch.float32
    c, err, sigma = cosines(x, x), 2*(d + 16)*U, 1 - margin
    f = dict(elu=lambda: F.elu(c - margin, alpha), eq4=lambda: torch.where(c >= margin, c, alpha*torch.expm1(c - margin)), gaussian=lambda: torch.exp(-.5*((1 - c)/sigma)**2)/(sigma*math.sqrt(2*math.pi)))[kind]()
    slope = 1/sigma**2 + 8/sigma if kind == 'gaussian' else 1 # how fast the curve moves, and its own rounding
    jump = ((c - margin).abs() <= err)*abs(margin) if kind == 'eq4' else 0*c # at the margin either side is right
    w = torch.ones_like(c) if mask is None else mask[:, None].expand_as(c).double()
    n = w.sum(-1)
    real = torch.ones(b, t, dtype=torch.bool) if mask is None else mask
    assert ((out - (f*w).sum(-1)/n).abs() <= slope*err + (jump*w).sum(-1)/n)[real].all() and (out[~real] == -math.inf).all()

@cases
@example(b=0, m=5, n=5, d=4, dtype=torch.float32, layout='plain', masked=True, copies=0, power=0, seed=0)
@example(b=2, m=0, n=5, d=4, dtype=torch.float32, layout='plain', masked=False, copies=0, power=0, seed=0)
@given(b=st.integers(1, 3), m=size(100), n=size(100), d=size(40), dtype=dtypes, layout=layouts, masked=st.booleans(), copies=st.integers(0, 4), power=st.sampled_from([0, -30, 30]), seed=seeds)
def test_match(b, m, n, d, dtype, layout, masked, copies, power, seed):
    x, y = ((randn(b, k, d, seed=seed + i).double()*10.**(0 if dtype == torch.float16 else power)).to(dtype) for i, k in enumerate((m, n)))
    g = torch.Generator().manual_seed(seed)
    for _ in range(copies): y[:, torch.randint(n, (1,), generator=g)] = y[:, torch.randint(n, (1,), generator=g)]
    x, y = lay(x, layout), lay(y, layout if layout != 'expanded' else 'plain')
    mask = torch.rand(b, n, generator=g) > .4 if masked else None
    dst, sim = match_tokens(x, y, mask_b=mask, impl=IMPL)
    assert dst.shape == sim.shape == (b, m) and dst.dtype == torch.int64 and sim.dtype == torch.float32
    if not b*m: return
    c, err = cosines(x, y), 2*(d + 16)*U
    if masked: c = c.masked_fill(~mask[:, None], -math.inf)
    none = c.amax(-1).isinf()
    assert (dst[none] == -1).all() and (sim[none] == -math.inf).all() and (dst[~none] >= 0).all()
    best, got = c.amax(-1), c.gather(-1, dst.clamp_min(0)[..., None])[..., 0]
    assert (best - got <= 2*err)[~none].all() and ((sim - best).abs() <= err)[~none].all()
    equal = (y[:, :, None] == y[:, None]).all(-1) # (b, n, n)
    if masked: equal &= mask[:, None]
    first = equal.float().argmax(-1) # the first eligible token equal to each
    assert (first.gather(1, dst.clamp_min(0)) == dst)[~none].all()

def test_match_rows_with_nan():
    x, y = randn(2, 20, 5, seed=0), randn(2, 30, 5, seed=1)
    good = match_tokens(x, y, impl=IMPL)
    for bad in (math.nan, math.inf): # values are refused on a CPU; the operator below is what a GPU runs
        a, b = x.clone(), y.clone()
        a[0, 3, 2], b[1, 4, 1] = bad, bad
        dst, sim = _match_op(a, y, None, INTERPRETED)
        assert dst[0, 3] == -1 and sim[0, 3].isnan() and (dst.flatten()[4:] == good[0].flatten()[4:]).all()
        dst, sim = _match_op(x, b, None, INTERPRETED)
        assert (dst[1] == -1).all() and sim[1].isnan().all() and (dst[0] == good[0][0]).all()
        assert _energy_op(a, None, .5, 1., 'elu', INTERPRETED)[0].isnan().all()

# --- merge_groups

@cases
@example(b=0, n=3, c=2, g=2, dtype=torch.float32, layout='plain', mode='mean', weighted=False, seed=0)
@example(b=2, n=0, c=2, g=2, dtype=torch.float32, layout='plain', mode='amax', weighted=False, seed=0)
@given(b=st.integers(1, 3), n=size(150), c=size(40), g=size(30), dtype=dtypes, layout=layouts, mode=st.sampled_from(['mean', 'sum', 'amax']), weighted=st.booleans(), seed=seeds)
@example(b=1, n=600, c=300, g=1, dtype=torch.bfloat16, layout='plain', mode='mean', weighted=True, seed=0)
def test_merge(b, n, c, g, dtype, layout, mode, weighted, seed):
    gen = torch.Generator().manual_seed(seed)
    x, group = lay(randn(b, n, c, seed=seed).to(dtype), layout), torch.randint(-1, g, (b, n), generator=gen)
    w = torch.rand(b, n, generator=gen) + .1 if weighted and mode != 'amax' else None
    out = merge_groups(x, group, g, w, mode=mode, impl=IMPL)
    assert out.shape == (b, g, c) and out.dtype == dtype
    on = F.one_hot(group + 1, g + 1)[..., 1:].double().mT # (b, g, n)
    if mode == 'amax':
        want = torch.stack([torch.where(on[:, j, :, None] > 0, x.double(), -math.inf).amax(1) for j in range(g)], 1) if n else out.double()
        assert torch.equal(out.double(), want.nan_to_num(neginf=0.)); return
    on = on if w is None else on*w.double()[:, None]
    total = on.sum(-1, keepdim=True) if mode == 'mean' else torch.ones(1, dtype=torch.float64)
    total = torch.where(total == 0, 1, total)
    want, scale = on @ x.double()/total, on @ x.double().abs()/total
    last = torch.finfo(dtype).eps/2 # rounding the result to its dtype
    assert ((out.double() - want).abs() <= (2*n + 8)*U*scale + last*want.abs()*1.01 + torch.finfo(dtype).smallest_normal).all()
    assert torch.equal(out, merge_groups(x, group, g, w, mode=mode, impl=IMPL))

@pytest.mark.parametrize('mode', ['mean', 'sum', 'amax'])
def test_merge_gradient(mode):
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.rand(2, 9, *s, dtype=torch.float64, generator=gen).requires_grad_() for s in ((3,), ()))
    group, args = torch.randint(-1, 4, (2, 9), generator=gen), ((x, w) if mode != 'amax' else (x,))
    f = lambda x, w=None, impl='torch': merge_groups(x, group, 5, w, mode=mode, impl=impl)
    if not INTERPRETED:
        assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)
        ties = torch.tensor([[[2.], [2.], [1.], [2.]]], requires_grad=True)
        if mode == 'amax': merge_groups(ties, torch.tensor([[0, 0, 0, -1]]), 1, mode='amax').sum().backward(); assert ties.grad.flatten().tolist() == [.5, .5, 0, 0]
        return
    grads = [torch.autograd.grad(f(*(a.float() for a in args), impl=i).square().sum(), args) for i in ('triton', 'torch')]
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

def test_merge_keeps_nan_in_its_group():
    x, group = randn(1, 12, 3, seed=0), torch.arange(12)[None] % 3
    x[0, 4] = math.nan
    for mode in ('mean', 'sum', 'amax'):
        y = merge_groups(x, group, 3, mode=mode, impl=IMPL)
        assert y[0, 1].isnan().all() and y[0, [0, 2]].isfinite().all()

# --- operators

def test_operators_are_registered_well():
    z, e, ids = randn(2, 30, 6, seed=0), randn(2, 20, 6, seed=1), torch.arange(60).view(2, 30) % 8
    w, mask = torch.rand(2, 30), torch.arange(60).view(2, 30) % 3 > 0
    k = INTERPRETED
    for op, args in [(_nearest_op, (z, e, 'euclidean', True, False, k)), (_nearest_op, (z, e, 'cosine', False, False, k)), (_stats_op, (z, ids, 8, k)), (_energy_op, (z, None, .5, 1., 'elu', k)), (_energy_op, (z, mask, .5, 1., 'eq4', k)),
                     (_match_op, (z, e, None, k)), *((_merge_op, (z.clone().requires_grad_(), ids, None if m == 'amax' else w.clone().requires_grad_(), 8, m, k)) for m in ('mean', 'sum', 'amax'))]:
        torch.library.opcheck(op, args)

@pytest.mark.skipif(INTERPRETED, reason='the graph is the same for both')
def test_compiles_without_a_graph_break():
    def step(z, e, x, group, w):
        codes, dist = nearest_code(z, e, return_distance=True)
        counts, sums = code_stats(z, codes, 20)
        dst, sim = match_tokens(x[:, ::2], x[:, 1::2])
        merged = merge_groups(x, group, 9, w).square().sum() + merge_groups(x, group, 9, mode='amax').sum()
        return merged, (codes, dist, counts, sums, energy_score(x, .4), dst, sim)
    args = randn(40, 6, seed=0), randn(20, 6, seed=1), randn(2, 30, 6, seed=2).requires_grad_(), torch.arange(60).view(2, 30) % 10 - 1, torch.rand(2, 30).requires_grad_()
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend='aot_eager')):
        y, rest = f(*args)
        results.append([y, *rest, *torch.autograd.grad(y, (args[2], args[4]))])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

@pytest.mark.skipif(INTERPRETED, reason='about the torch implementation')
def test_threads_do_not_change_a_bit():
    z, e = randn(9000, 16, seed=0), randn(600, 16, seed=1)
    x, group = randn(2, 700, 64, seed=2), torch.arange(1400).view(2, 700) % 31
    def all_of():
        codes = nearest_code(z, e)
        return [codes, *code_stats(z, codes, 600), merge_groups(x, group, 31), merge_groups(x, group, 31, mode='amax')]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = all_of()
        torch.set_num_threads(2); two = all_of()
    finally: torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))

@pytest.mark.skipif(INTERPRETED, reason='about the torch implementation')
def test_no_table_in_memory():
    "Peak memory beyond inputs, in a fresh process: a small part of the table, while the eager form of the same call is seen to hold it."
    script = """
import torch
from tokbook.bench import CASES, peak_bytes
for name, contender, sizes, small in [('nearest_code', 'tokbook', dict(n=4096, k=8192, d=16), dict(n=64, k=64, d=16)), ('energy_score', 'tokbook', dict(b=1, t=4096, d=32), dict(b=1, t=64, d=32)),
                                      ('match_merge', 'tokbook', dict(b=1, t=8192, d=16, c=8), dict(b=1, t=64, d=16, c=8)), ('nearest_code', 'addmm + argmin', dict(n=4096, k=8192, d=16), dict(n=64, k=64, d=16))]:
    make = CASES[name][0]
    make('cpu', **small)[0][contender]() # loads libraries
    print(peak_bytes(make('cpu', **sizes)[0][contender]))
"""
    near, energy, merge, eager = map(int, subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split())
    table, square = 4*4096*8192, 4*4096**2
    assert eager > .95*table # the measurement sees it
    assert near < table/10 and energy < square/5 and merge < square/4

# --- Triton

@pytest.mark.skipif(INTERPRETED, reason='starts this process')
def test_triton(): interpret(__file__)

@pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')
def test_kernels_compile_for_a_gpu():
    pytest.importorskip('triton')
    from tokbook.kernels import merging, nearest
    f32, i64, i32, bf16 = '*fp32', '*i64', 'i32', '*bf16'
    near = dict(z_ptr=bf16, e_ptr=f32, bias_ptr=f32, mu_ptr=f32, scale_ptr=f32, wt_ptr=f32, code_ptr=i64, best_ptr=f32, n=i32, k=i32, d=i32, span=i32)
    for d in (8, 256):
        c = nearest._tiles(4096, 4096, d)[0]; c.pop('num_stages')
        assert 'mma' not in cubin(nearest._nearest_kernel, near, PRECISION='ieee', WEIGHT=d == 8, SPLIT=d == 256, **c) # full fp32: no tensor cores
    bag = dict(x_ptr=bf16, index_ptr=i64, weight_ptr=f32, edge_ptr=i64, out_ptr=f32, c=i32)
    for index, weight, top in ((False, False, False), (True, True, False), (True, False, True)):
        assert 'atom' not in cubin(nearest._bag_kernel, bag, BR=16, BC=256, INDEX=index, WEIGHT=weight, MAX=top)
    cubin(merging._energy_kernel, dict(x_ptr=f32, inv_ptr=f32, mask_ptr='*i1', out_ptr=f32, t=i32, d=i32, margin='fp32', alpha='fp32'), KIND='elu', MASKED=True, BT=64, BD=64)
    cubin(merging._match_kernel, dict(a_ptr=f32, b_ptr=f32, inva_ptr=f32, invb_ptr=f32, bias_ptr=f32, dst_ptr=i64, sim_ptr=f32, m=i32, n=i32, d=i32), BM=64, BN=64, BD=64)

def test_which_implementation():
    x = torch.zeros(2)
    assert not use_triton(x) and not use_triton(x, 'torch')
    with pytest.raises(ValueError, match='impl'): use_triton(x, 'cuda')
    if INTERPRETED:
        assert use_triton(x, 'triton')
        with pytest.raises(TypeError, match='float64'): use_triton(x.double(), 'triton')
    else:
        with pytest.raises(RuntimeError, match='needs'): use_triton(x, 'triton')

def test_bench_main_refuses_what_it_does_not_know(capsys):
    from tokbook.bench import main
    with pytest.raises(SystemExit): main(['--device', 'abacus'])
    assert 'invalid choice' in capsys.readouterr().err
