"Kernels of quantizers: weighted and split search, residual codes, scalar codes, entropies, against float64 references written independently; see kernel_tools.py."
import math, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from hypothesis import example, given, strategies as st
from kernel_tools import IMPL, INTERPRETED, U, cases, cubin, dtypes, interpret, lay, layouts, randn, seeds, size
from tokbook.kernels import assignment_entropy, binary_entropy, nearest_code, residual_nearest, scalar_quantize
from tokbook.kernels import nearest, residual, scalar
from tokbook.kernels.nearest import _nearest_op, _parts, _prepare

plain = pytest.mark.skipif(INTERPRETED, reason='about what runs without Triton')

def allowed(z, e, w=None): # (n,) the stated bound on squared distances; z (n, d), e (k, d), any dtype
    _, mu, g, _ = _prepare(e.float(), 'euclidean', torch.float32)
    c, root = (mu*g).double(), 1 if w is None else w.double().sqrt()
    return 4*(z.shape[1] + 8)*U*(((z.double() - c)*root).norm(dim=1) + ((e.double() - c)*root).norm(dim=1).max())**2

def squared(z, e, w=1.): return torch.stack([(w*(r - e.double())**2).sum(1) for r in z.double()]) if len(z) else torch.zeros(0, len(e), dtype=torch.float64)

# --- nearest_code: weights, parts, size

@cases
@example(n=0, k=3, d=2, dtype=torch.float32, layout='plain', shift=0., power=0, kind='mixed', seed=0)
@given(n=size(90), k=size(150), d=st.one_of(st.sampled_from([1, 16, 130]), st.integers(1, 40)), dtype=dtypes, layout=layouts, shift=st.sampled_from([0., 100., 1e5]), power=st.sampled_from([0, -20, 15]),
       kind=st.sampled_from(['mixed', 'one', 'equal', 'none', 'extreme']), seed=seeds)
def test_weights(n, k, d, dtype, layout, shift, power, kind, seed):
    if dtype == torch.float16: power, shift = 0, min(shift, 100.)
    g = torch.Generator().manual_seed(seed)
    z, e = (((randn(m, d, seed=seed + i) + shift).double()*10.**power).to(dtype) for i, m in enumerate((n, k)))
    w = dict(mixed=torch.rand(d, generator=g)*(torch.rand(d, generator=g) > .3), one=F.one_hot(torch.tensor(seed % d), d).float()*7, equal=torch.full((d,), 3.), none=torch.zeros(d),
             extreme=10.**(torch.rand(d, generator=g)*30 - 15))[kind]
    z, e = lay(z, layout), lay(e, layout) if layout != 'expanded' else e
    codes, dist = nearest_code(z, e, weight=w, return_distance=True, impl=IMPL)
    assert codes.shape == (n,) and dist.dtype == torch.float32
    if not n: return
    full, pick = squared(z, e, w.double()), torch.arange(n)
    low, bound = full.amin(1), allowed(z, e, w)
    assert (full[pick, codes] - low <= bound).all()
    rest = full.masked_fill(full == low[:, None], math.inf).amin(1) - low > bound
    assert (full[pick, codes] == low)[rest].all() # different codes at one distance may swap: a weight is rounded before it multiplies
    same = ((e[:, None] == e[None]) | (w == 0)).all(-1).float().argmax(1) # the first code equal to each where it counts
    assert (same[codes] == codes).all()
    torch.testing.assert_close(dist, full[pick, codes].sqrt().float(), rtol=1e-6, atol=1e-37)
    if kind == 'equal': assert (squared(z, e)[pick, nearest_code(z, e, impl=IMPL)] - squared(z, e)[pick, codes]).abs().max() <= 2*allowed(z, e).max()

def test_weights_by_head_and_ignored_coordinates():
    z, e, w = randn(2, 30, 5, seed=0), randn(2, 9, 5, seed=1), torch.rand(2, 5)
    both = nearest_code(z, e, weight=w, impl=IMPL)
    for h in range(2): assert torch.equal(both[h], nearest_code(z[h], e[h], weight=w[h], impl=IMPL))
    w = torch.tensor([1., 0, 2, 0, 1]) # what does not count may be of any size, and still may not be NaN
    far, fe = z.clone(), e.clone()
    far[..., 1], fe[..., 3] = 1e38, -2e38
    assert torch.equal(nearest_code(far, fe, weight=w, impl=IMPL), nearest_code(z, e, weight=w, impl=IMPL))
    far[0, 3, 1] = math.nan
    codes, dist = nearest_code(far, fe, weight=w, return_distance=True, impl=IMPL)
    assert codes[0, 3] == -1 and dist[0, 3].isnan() and (codes.flatten() < 0).sum() == 1

@cases
@given(bands=st.integers(1, 10**6), k=st.integers(1, 2**20), bk=st.sampled_from([16, 64, 128, 256]), processors=st.integers(1, 200))
def test_parts_cover_all_codes(bands, k, bk, processors):
    p, span = _parts(bands, k, bk, processors)
    assert span % bk == 0 and (p - 1)*span < k <= p*span # none is empty, none is missing
    assert p == 1 or (p*bands <= 2*processors and span >= 4*bk - bk*(k % bk > 0))

@pytest.mark.skipif(not INTERPRETED, reason='about the Triton kernel')
def test_parts_do_not_change_a_code():
    z, e = randn(1, 33, 6, seed=0), torch.cat([randn(1, 700, 6, seed=1)]*3, 1) # every code three times, in different parts
    z[0, 5, 2], z[0, 6, 1] = math.nan, math.inf
    with torch.no_grad():
        cut = lambda p: lambda bk: (p, -(-(-(-2100//bk))//p)*bk)
        one = nearest._search_triton(z, e, 'euclidean', False, parts=cut(1))
        assert (one[0, [5, 6]] == -1).all() and one.max() < 700
        for p in (2, 3, 5): assert torch.equal(nearest._search_triton(z, e, 'euclidean', False, parts=cut(p)), one)
        w = torch.rand(1, 6)
        assert torch.equal(*(nearest._search_triton(z, e, 'euclidean', False, w, parts=cut(p)) for p in (1, 4)))
        assert _parts(1, 2100, 128, nearest._processors(z))[0] > 1 # and the public function does cut here
    want = squared(z[0].nan_to_num(posinf=0), e[0]).argmin(1) % 700
    assert torch.equal(nearest_code(z[0], e[0], impl=IMPL)[7:], want[7:])

@plain
def test_a_million_codes_and_ten_million_vectors():
    e = randn(2**20, 8, seed=0)
    at = [2**20 - 1, 0, 777777, 2**19]
    assert nearest_code(e[at] + 1e-3, e).tolist() == at
    n = 10**7
    codes, dist = nearest_code(torch.empty(n, 1024, device='meta'), torch.empty(2**20, 1024, device='meta'), return_distance=True)
    assert codes.shape == dist.shape == (n,)
    codes, total = residual_nearest(torch.empty(n, 1024, device='meta'), torch.empty(8, 2**16, 1024, device='meta'))
    assert codes.shape == (n, 8) and total.shape == (n, 1024)

@plain
def test_no_32_bit_product_makes_an_address():
    "Beyond 2^31 numbers an address must not pass through 32 bits: in what Triton makes of the kernels there is no 32-bit multiplication."
    triton = pytest.importorskip('triton')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    def products(kernel, types, **const):
        sig = {a: types.get(a, 'constexpr') for a in kernel.arg_names}
        ir = triton.compile(ASTSource(fn=kernel, signature=sig, constexprs=const), target=GPUTarget('cuda', 80, 32)).asm['ttir']
        return [l.split(':')[1] for l in ir.splitlines() if 'arith.muli' in l]
    near = products(nearest._nearest_kernel, NEAR, BN=32, BK=64, BD=16, SHORT=False, WEIGHT=True, SPLIT=True, PRECISION='ieee')
    res = products(residual._residual_kernel, RESIDUAL, BN=32, BK=32, BD=16, DEPTH=True)
    small = 3 # in the residual kernel: twice and d times the number of a stage, which is small; the stage's number itself
    assert len(near) > 5 and all('i64' in l for l in near), near
    assert len(res) > 3 and sum('i64' not in l for l in res) <= small and not any('tensor' in l and 'i64' not in l for l in res), res

# --- residual_nearest

@cases
@example(n=0, sizes=[3, 2], d=2, dtype=torch.float32, layout='plain', shift=0., power=0, depth='all', seed=0)
@example(n=2, sizes=[2], d=129, dtype=torch.float32, layout='transposed', shift=0., power=0, depth='all', seed=0)
@given(n=size(130), sizes=st.lists(size(70), min_size=1, max_size=5), d=st.one_of(st.sampled_from([1, 16, 64, 128, 129]), st.integers(1, 40)), dtype=dtypes, layout=layouts, shift=st.sampled_from([0., 0., 1e3]),
       power=st.sampled_from([0, 0, -25, 25]), depth=st.sampled_from(['all', 'one', 'rows']), seed=seeds)
def test_residual(n, sizes, d, dtype, layout, shift, power, depth, seed):
    if dtype == torch.float16: power, shift = 0, min(shift, 100.)
    g, q = torch.Generator().manual_seed(seed), len(sizes)
    z = lay(((randn(n, d, seed=seed) + shift).double()*10.**power).to(dtype), layout)
    books = [((randn(k, d, seed=seed + i + 1)*.6**i + shift*(i == 0)).double()*10.**power).to(torch.float64 if dtype == torch.float64 else torch.float32) for i, k in enumerate(sizes)]
    stages = dict(all=None, one=int(torch.randint(0, q + 1, (), generator=g)), rows=torch.randint(0, q + 1, (n,), generator=g))[depth]
    codes, total = residual_nearest(z, books, stages=stages, impl=IMPL)
    assert codes.shape == (n, q) and codes.dtype == torch.int64 and total.shape == (n, d) and total.dtype == books[0].dtype
    left = torch.full((n,), q) if stages is None else torch.full((n,), stages) if isinstance(stages, int) else stages
    r, sums = z.to(books[0].dtype), torch.zeros(n, d, dtype=books[0].dtype)
    for s, book in enumerate(books): # each stage is judged for the residual that it saw
        on, c = left > s, codes[:, s]
        assert (c[~on] == -1).all() and (c[on] >= 0).all() and (c < len(book)).all()
        if on.any():
            full = squared(r[on], book)
            assert (full.gather(1, c[on][:, None])[:, 0] - full.amin(1) <= allowed(r[on], book)).all()
        if not INTERPRETED and n: assert torch.equal(c[on], nearest_code(r, book, impl=IMPL)[on]) # the loop itself
        step = torch.where(on[:, None], book[c.clamp_min(0)], 0)
        r, sums = r - step, sums + step
    assert torch.equal(total, sums)

def test_residual_rows_with_nan_and_ties():
    z, books = randn(2, 3, 20, 7, seed=0), randn(3, 12, 7, seed=1)
    good, _ = residual_nearest(z, books, impl=IMPL)
    for bad in (math.nan, math.inf, -math.inf):
        x = z.clone(); x[1, 2, 4, 3] = bad
        codes, total = residual_nearest(x, books, impl=IMPL)
        row = torch.zeros(2, 3, 20, dtype=torch.bool); row[1, 2, 4] = True
        assert (codes[row] == -1).all() and total[row].isnan().all() and torch.equal(codes[~row], good[~row]) and total[~row].isfinite().all()
        depth = torch.full((2, 3, 20), 3); depth[1, 2, 4] = 0
        assert (residual_nearest(x, books, stages=depth, impl=IMPL)[1][row] == 0).all() # a row that uses no stage
    twice = books[:, torch.arange(24) % 12]
    assert torch.equal(residual_nearest(z, twice, impl=IMPL)[0], good)
    q1 = residual_nearest(z, books[:1], impl=IMPL)[0][..., 0]
    assert torch.equal(q1, nearest_code(z, books[0], impl=IMPL))
    zero = F.pad(books, (0, 0, 1, 0)) # a codebook that holds zero never makes the rest longer
    lengths = torch.stack([(z - residual_nearest(z, zero, stages=s, impl=IMPL)[1]).norm(dim=-1) for s in range(4)])
    assert (lengths.diff(dim=0) <= 1e-6).all()

# --- scalar_quantize

def digits_of(code, levels): # (n,) -> (n, c), with Python's integers
    out = []
    for x in code.tolist():
        row = []
        for l in levels: row.append(x % l); x //= l
        out.append(row)
    return torch.tensor(out).view(len(out), len(levels))

@plain
@cases
@example(n=0, levels=[5, 4], dtype=torch.float32, layout='plain', spread=1., seed=0)
@example(n=300, levels=[2]*62, dtype=torch.float32, layout='plain', spread=1., seed=0) # beyond what float64 holds
@example(n=40000, levels=[8, 5], dtype=torch.float32, layout='plain', spread=1., seed=0) # several pieces
@given(n=size(300), levels=st.lists(st.integers(2, 17), min_size=1, max_size=12), dtype=dtypes, layout=layouts, spread=st.sampled_from([.1, 1., 30.]), seed=seeds)
def test_fsq(n, levels, dtype, layout, spread, seed):
    x = lay((randn(n, len(levels), seed=seed)*spread).to(dtype), layout)
    value, code = scalar_quantize(x, levels)
    assert value.dtype == dtype and value.shape == x.shape and code.shape == (n,)
    if not n: return
    digit = digits_of(code, levels)
    L = torch.tensor(levels, dtype=torch.float64)
    reach, offset = (L - 1)*1.001/2, .5*(L % 2 == 0)
    soft = reach*torch.tanh(x.double() + torch.where(L > 2, torch.atanh(offset/reach), 0)) - offset
    near = digit - L//2
    assert ((soft - near).abs() <= .5 + L*16*(U if dtype != torch.float64 else 2**-53)).all() # the nearest level, or at a boundary
    assert torch.equal(value, (near/(L//2)).to(dtype) if dtype == torch.float64 else (near.float()/(L//2).float()).to(dtype))
    assert torch.equal(scalar_quantize(x, levels, pack=False)[1], digit) and code.max() < math.prod(levels)

@plain
@cases
@given(n=size(300), c=size(62), kind=st.sampled_from(['lfq', 'bsq']), dtype=dtypes, layout=layouts, power=st.sampled_from([0, 0, 15, -15]), seed=seeds)
def test_signs(n, c, kind, dtype, layout, power, seed):
    x = lay((randn(n, c, seed=seed).double()*10.**(0 if dtype == torch.float16 else power)).to(dtype), layout)
    x = torch.where(randn(n, c, seed=seed + 1) > 1, 0, x).to(dtype) # zero is negative
    value, code = scalar_quantize(x, kind=kind)
    assert torch.equal(digits_of(code, [2]*c), (x > 0).long())
    want = torch.where(x > 0, 1., -1.)/(c**.5 if kind == 'bsq' else 1)
    torch.testing.assert_close(value, want.to(dtype))
    if kind == 'bsq' and c > 1: # never farther from the sphere's point than sqrt(2 - 2/sqrt(c))
        u, some = F.normalize(x.double(), dim=-1), x.double().norm(dim=-1) > 1e-12 # shorter ones have no direction
        assert ((u - value.double()).norm(dim=-1)[some] <= math.sqrt(2 - 2/c**.5) + 2*torch.finfo(dtype).eps*c).all()

@plain
@cases
@given(n=size(300), c=st.integers(1, 6), sizes=st.lists(st.integers(1, 20), min_size=6, max_size=6), shared=st.booleans(), dtype=dtypes, layout=layouts, seed=seeds)
def test_bins(n, c, sizes, shared, dtype, layout, seed):
    g = torch.Generator().manual_seed(seed)
    x = lay(randn(n, c, seed=seed).to(dtype), layout)
    acc = torch.promote_types(dtype, torch.float32)
    edges = [torch.randn(b, generator=g).to(dtype).unique().to(acc) for b in ([sizes[0]]*c if shared else sizes[:c])]
    if shared: edges = edges[:1]*c
    x = torch.where(torch.rand(n, c, generator=g) < .2, torch.stack([e[torch.randint(len(e), (n,), generator=g)] for e in edges], 1), x).to(dtype) # many lie on an edge: the lower bin
    centers = [torch.randn(len(e) + 1, generator=g, dtype=acc) for e in edges]
    value, digit = scalar_quantize(x, edges=edges[0] if shared else edges, centers=centers[0] if shared else centers, pack=False)
    if shared: centers = centers[:1]*c
    want = torch.stack([(x[:, i, None].to(acc) > e).sum(-1) for i, e in enumerate(edges)], 1)
    assert torch.equal(digit, want) and torch.equal(value, torch.stack([centers[i][want[:, i]] for i in range(c)], 1).to(dtype))
    code = scalar_quantize(x, edges=edges[0] if shared else edges, centers=centers[0] if shared else centers)[1]
    assert torch.equal(digits_of(code, [len(e) + 1 for e in edges]), want)

@plain
@pytest.mark.parametrize('kind', ['fsq', 'lfq', 'bsq', 'bins'])
def test_scalar_rows_with_nan(kind):
    how = dict(fsq=dict(levels=(5, 4, 2)), lfq={}, bsq={}, bins=dict(edges=torch.tensor([-1., 0, 1]), centers=torch.tensor([-2., -.5, .5, 2])))[kind]
    x = randn(4, 5, 3, seed=0)
    good = scalar_quantize(x, kind=kind, **how)
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone(); y[2, 3, 1] = bad
        value, code = scalar_quantize(y, kind=kind, **how)
        row = torch.zeros(4, 5, dtype=torch.bool); row[2, 3] = True
        assert (code[row] == -1).all() and value[row].isnan().all() and torch.equal(code[~row], good[1][~row]) and torch.equal(value[~row], good[0][~row])
        assert (scalar_quantize(y, kind=kind, pack=False, **how)[1][row] == -1).all()

@plain
def test_scalar_gradient_is_that_of_the_bound():
    levels, x, go = (8, 5, 2, 3), randn(5000, 4, seed=0).double().requires_grad_(), randn(5000, 4, seed=1).double()
    L = torch.tensor(levels); reach, offset = (L - 1)*1.001/2, .5*(L % 2 == 0)
    shift = torch.where(L > 2, torch.atanh((offset/reach).double()), 0)
    for kind, bound in dict(fsq=lambda x: reach.double()*torch.tanh(x + shift)/(L//2), bsq=lambda x: x/x.norm(dim=-1, keepdim=True), lfq=lambda x: x).items():
        y = scalar_quantize(x, levels if kind == 'fsq' else None, kind=kind)[0]
        torch.testing.assert_close(torch.autograd.grad(y, x, go)[0], torch.autograd.grad(bound(x), x, go)[0], rtol=1e-6, atol=1e-9)
        half = x.detach().bfloat16().requires_grad_()
        y = scalar_quantize(half, levels if kind == 'fsq' else None, kind=kind)[0]
        assert y.dtype == torch.bfloat16 and torch.autograd.grad(y, half, go.bfloat16())[0].dtype == torch.bfloat16

@plain
def test_scalar_as_the_compiler_sees_it(monkeypatch):
    "The expression that is inlined on a GPU: the same numbers, and two kernels at most."
    from torch._inductor import metrics
    monkeypatch.setattr(scalar, '_inline', lambda x: torch.compiler.is_compiling())
    levels, x = (8, 8, 5), randn(257, 3, seed=0)
    for kind in ('fsq', 'lfq', 'bsq'):
        lv = levels if kind == 'fsq' else None
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, code = torch.compile(lambda x: scalar_quantize(x, lv, kind=kind), fullgraph=True, backend='aot_eager')(a)
        want, wcode = scalar_quantize(b, lv, kind=kind)
        assert torch.equal(code, wcode); torch.testing.assert_close(y, want)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), a)[0], torch.autograd.grad(want.sum(), b)[0])
    try: from torch._inductor.cpp_builder import get_cpp_compiler; get_cpp_compiler()
    except Exception as e: pytest.skip(f'no C++ compiler: {e}')
    metrics.reset()
    y, code = torch.compile(lambda x: scalar_quantize(x, levels), fullgraph=True)(x)
    want, wcode = scalar_quantize(x, levels)
    assert torch.equal(code, wcode) and (y - want).abs().max() < 1e-6 and metrics.generated_kernel_count <= 2

# --- entropies

def entropies(p, w): # (n, k) float64, (n,)
    h = lambda p: -torch.xlogy(p, p).sum(-1)
    return (w*h(p)).sum(), h((w[:, None]*p).sum(0))

@plain
@cases
@example(n=1, k=1, d=1, dtype=torch.float32, t=1., shift=0., masked=False, layout='plain', seed=0)
@example(n=700, k=3000, d=4, dtype=torch.float32, t=1., shift=0., masked=True, layout='plain', seed=0) # several bands
@given(n=size(200), k=size(150), d=size(40), dtype=dtypes, t=st.sampled_from([.05, 1., 20.]), shift=st.sampled_from([0., 0., 100.]), masked=st.booleans(), layout=layouts, seed=seeds)
def test_assignment_entropy(n, k, d, dtype, t, shift, masked, layout, seed):
    z, e = (lay((randn(m, d, seed=seed + i) + shift).to(dtype), layout if i == 0 else 'plain') for i, m in enumerate((n, k)))
    mask = randn(n, seed=seed + 2) > -.5 if masked else None
    w = torch.ones(n, dtype=torch.float64) if mask is None else mask.double()
    w = w/w.sum().clamp_min(1)
    d2 = squared(z, e)
    want = entropies((-d2/t).softmax(-1), w)
    if masked: z = torch.where(mask[:, None], z, math.nan)
    got = assignment_entropy(z, e, t, mask=mask)
    c = e.double().mean(0)
    real = z.double()[w > 0]
    u = U if dtype != torch.float64 else 2**-50
    delta = 4*(d + 8)*u*(((real - c).norm(dim=1).amax() if len(real) else 0) + (e.double() - c).norm(dim=1).amax())**2/t
    for a, b in zip(got, want):
        assert a.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(a.double() - b) <= (2*delta + 16*u)*(1 + math.log(k)) + 1e-6*(dtype != torch.float64)

@plain
def test_entropy_gradients():
    z, e = (randn(n, 3, seed=n).double().requires_grad_() for n in (7, 5))
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    for m in (None, mask):
        for t in (.3, 5.): assert torch.autograd.gradcheck(lambda z, e: assignment_entropy(z, e, t, mask=m), (z, e))
        assert torch.autograd.gradcheck(lambda x: binary_entropy(x, mask=m), (z,)) and torch.autograd.gradgradcheck(lambda x: binary_entropy(x, mask=m), (z,))
    z, e = randn(900, 6, seed=0).requires_grad_(), randn(2100, 6, seed=1).requires_grad_() # several bands
    got, d2 = assignment_entropy(z, e, 2.), (z[:, None].double() - e[None].double()).square().sum(-1)
    want = entropies((-d2/2).softmax(-1), torch.full((900,), 1/900, dtype=torch.float64))
    for a, b in zip(torch.autograd.grad(got[0] - .7*got[1], (z, e)), torch.autograd.grad(want[0] - .7*want[1], (z, e))): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    none = assignment_entropy(z[:3].detach()/0, e, mask=torch.zeros(3, dtype=torch.bool)) # nothing counts
    assert none[0] == 0 and none[1] == 0
    sure = torch.tensor([[200., -200], [-200, 200]], requires_grad=True) # saturated bits: no NaN on the way back
    assert torch.autograd.grad(sum(binary_entropy(sure)), sure)[0].isfinite().all()

@plain
@cases
@given(n=size(100), l=st.integers(1, 7), t=st.sampled_from([.2, 1., 5.]), seed=seeds)
def test_binary_entropy(n, l, t, seed):
    x = randn(n, l, seed=seed).double()
    codes = torch.cartesian_prod(*[torch.tensor([-1., 1.], dtype=torch.float64)]*l).view(2**l, l)
    exact, bits = assignment_entropy(x, codes, t), binary_entropy(4*x/t)
    assert abs(exact[0] - bits[0]) < 1e-9 and exact[1] <= bits[1] + 1e-9
    if l == 1: assert abs(exact[1] - bits[1]) < 1e-9

# --- operators

def test_operators_are_registered_well():
    z, e, k = randn(2, 30, 6, seed=0), randn(2, 20, 6, seed=1), INTERPRETED
    torch.library.opcheck(_nearest_op, (z, e, 'euclidean', True, False, k, torch.rand(2, 6)))
    for depth in (None, torch.arange(30) % 4): torch.library.opcheck(residual._residual_op, (z[0], torch.cat([e[0], e[1]]), [20, 13, 7], depth, 3, k))
    if INTERPRETED: return
    x = randn(50, 3, seed=0).requires_grad_()
    for kind in ('fsq', 'lfq', 'bsq'): torch.library.opcheck(scalar._scalar_op, (x, [5, 4, 2] if kind == 'fsq' else [2]*3, kind, 1e-3, None, None, kind != 'bsq'))
    torch.library.opcheck(scalar._scalar_op, (x, [2]*3, 'bins', 1e-3, torch.zeros(3, 1), torch.ones(3, 2), True))
    w = torch.full((30,), 1/30)
    torch.library.opcheck(scalar._entropy_op, (z[0].clone().requires_grad_(), e[0].clone().requires_grad_(), w, 2.))

@plain
def test_compiles_without_a_graph_break():
    def step(z, books, w):
        code = nearest_code(z, books[0], weight=w)
        codes, total = residual_nearest(z, books, stages=2)
        value, packed = scalar_quantize(z, (5, 4, 3, 2))
        one, batch = assignment_entropy(z, books[0], 2.)
        return value.square().sum() + one - batch + sum(binary_entropy(z)), (code, codes, total, packed)
    args = randn(40, 4, seed=0).requires_grad_(), randn(3, 9, 4, seed=1), torch.rand(4)
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend='aot_eager')):
        y, rest = f(*args)
        results.append([y, *rest, torch.autograd.grad(y, args[0])[0]])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

@plain
def test_ignores_autocast_and_threads():
    z, books = randn(3000, 16, seed=0)*torch.logspace(0, 2, 16) + 50, randn(3, 60, 16, seed=1)*torch.logspace(0, 2, 16) + 50
    want = residual_nearest(z, books)
    with torch.autocast('cpu', torch.bfloat16):
        assert all(map(torch.equal, residual_nearest(z, books), want))
        cast = *assignment_entropy(z, books[0], 1e4), *binary_entropy(z)
    assert all(map(torch.equal, cast, (*assignment_entropy(z, books[0], 1e4), *binary_entropy(z))))
    before = torch.get_num_threads()
    try: torch.set_num_threads(2); two = residual_nearest(z, books)
    finally: torch.set_num_threads(before)
    assert all(map(torch.equal, two, want))

@plain
def test_no_table_in_memory():
    "Peak memory beyond inputs, in a fresh process: a small part of the table, while the eager form of the same call is seen to hold it."
    script = """
import torch
from tokbook.bench import CASES, peak_bytes
for name, contender, sizes, small in [('assignment_entropy', 'tokbook', dict(n=8192, k=2048, d=8), dict(n=64, k=64, d=8)), ('assignment_entropy', 'eager', dict(n=8192, k=2048, d=8), dict(n=64, k=64, d=8)),
                                      ('residual_nearest', 'tokbook', dict(n=8192, q=2, k=2048, d=8), dict(n=64, q=2, k=64, d=8)), ('scalar_quantize', 'tokbook', dict(n=2**18, levels=(8, 5)), dict(n=64, levels=(8, 5)))]:
    make = CASES[name][0]
    make('cpu', **small)[0][contender]() # loads libraries
    print(peak_bytes(make('cpu', **sizes)[0][contender]))
"""
    ours, eager, res, sca = map(int, subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split())
    table = 4*8192*2048
    assert eager > 1.9*table # the measurement sees it
    assert ours < table/5 and res < table/5
    assert sca < 2**18*(4*2*2 + 8) + 2**23 # values, gradient and codes, and pieces

# --- Triton

NEAR = dict(z_ptr='*bf16', e_ptr='*fp32', bias_ptr='*fp32', mu_ptr='*fp32', scale_ptr='*fp32', wt_ptr='*fp32', code_ptr='*i64', best_ptr='*fp32', n='i32', k='i32', d='i32', span='i32')
RESIDUAL = dict(z_ptr='*bf16', book_ptr='*fp32', e_ptr='*fp32', bias_ptr='*fp32', mu_ptr='*fp32', scale_ptr='*fp32', edge_ptr='*i64', depth_ptr='*i64', code_ptr='*i64', sum_ptr='*fp32', n='i32', d='i32', q='i32', stages='i32')

@plain
def test_triton(): interpret(__file__)

@plain
def test_kernels_compile_for_a_gpu():
    pytest.importorskip('triton')
    for d, depth in ((16, False), (64, True), (128, True)):
        c = residual._sizes(d)[0]; c.pop('num_stages')
        assert 'mma' not in cubin(residual._residual_kernel, RESIDUAL, DEPTH=depth, **c) # full fp32: no tensor cores
