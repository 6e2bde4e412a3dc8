"Greedy selection, one-call merging and unmerging, both implementations; see kernel_tools.py."
import itertools, math, subprocess, sys
import pytest, torch
from hypothesis import example, given, strategies as st
from kernel_tools import IMPL, INTERPRETED, U, cases, cubin, dtypes, interpret, lay, layouts, randn, seeds, size
from tokbook.kernels import greedy_select, grid_receivers, match_and_merge, merge_groups, unmerge_groups
from tokbook.kernels import select
from tokbook.kernels.merging import _unmerge_op
from tokbook.kernels.select import _select_op

# --- greedy_select

def distances(x, metric, squared): # (n, d) -> (n, n) float64
    x = x.double()
    if metric == 'euclidean': d = torch.stack([((r - x)**2).sum(1) for r in x]); return d if squared else d.sqrt()
    c = (u := x/x.norm(dim=1, keepdim=True).clamp_min(1e-300)) @ u.T
    return {'cosine': 1 - c, 'chordal': (2 - 2*c).clamp_min(0).sqrt(), 'angle': c.clamp(-1, 1).acos()}[metric]

@cases
@example(b=0, n=5, d=4, k=3, dtype=torch.float32, layout='plain', criterion='max_sum', metric='cosine', masked=True, weighted=True, given_start=True, copies=0, seed=0)
@example(b=1, n=1, d=1, k=1, dtype=torch.float32, layout='plain', criterion='k_center', metric='angle', masked=False, weighted=False, given_start=False, copies=0, seed=0)
@given(b=st.integers(1, 3), n=size(70), d=st.integers(1, 40), k=st.integers(1, 24), dtype=dtypes, layout=st.sampled_from(['plain', 'every second', 'transposed']), criterion=st.sampled_from(['max_sum', 'k_center']),
       metric=st.sampled_from(['cosine', 'chordal', 'angle', 'euclidean']), masked=st.booleans(), weighted=st.booleans(), given_start=st.booleans(), copies=st.integers(0, 4), seed=seeds)
def test_select(b, n, d, k, dtype, layout, criterion, metric, masked, weighted, given_start, copies, seed):
    "Each pick, given those before, is the best to within the stated bound; of equal tokens the first; what is masked never."
    g, k = torch.Generator().manual_seed(seed), min(k, n)
    x = randn(b, n, d, seed=seed)
    for _ in range(copies): x[:, torch.randint(n, (1,), generator=g)] = x[:, torch.randint(n, (1,), generator=g)]
    x = lay(x.to(dtype), layout)
    mask = torch.rand(b, n, generator=g).argsort(-1) < max(k, n//2) if masked else None
    w = torch.randint(1, 4, (b, n), generator=g).float() if weighted else None
    alive = torch.ones(b, n, dtype=torch.bool) if mask is None else mask
    start = torch.rand(b, n, generator=g).masked_fill(~alive, -1).argmax(1) if given_start else None
    picks = greedy_select(x, k, criterion=criterion, metric=metric, start=start, weight=w, mask=mask, impl=IMPL)
    assert picks.shape == (b, k) and picks.dtype == torch.int64
    err = 2*(d + 16)*U + 2*U # of a cosine, and of one minus it
    for i in range(b):
        p, total = picks[i].tolist(), criterion == 'max_sum'
        assert len(set(p)) == k and alive[i][picks[i]].all()
        if start is not None: assert p[0] == start[i]
        dist, wi = distances(x[i], metric, not total), torch.ones(n).double() if w is None else w[i].double()
        if metric == 'euclidean': r = (x[i].double() - x[i][alive[i]].double().mean(0)).norm(dim=1).max(); e = 4*(d + 8)*U*4*r**2; e = e.sqrt() if total else e
        else: e = {'cosine': err, 'chordal': math.sqrt(2*err), 'angle': 2*math.sqrt(2*err)}[metric]
        for t in range(1, k):
            before = torch.tensor(p[:t])
            value = dist[:, before].sum(1) if total else dist[:, before].amin(1)
            value = (value*wi).masked_fill(~alive[i], -math.inf); value[before] = -math.inf
            bound = 2*(t*(e + t*U*4) if total else e)*wi.max()
            assert value.max() - value[p[t]] <= bound, (t, p)
            twins = (x[i] == x[i, p[t]]).all(1) & (wi == wi[p[t]]) & alive[i]; twins[before] = False
            assert twins.nonzero()[0] == p[t] # of equal tokens the first

@cases
@given(n=size(60), d=st.integers(1, 5), k=st.integers(2, 20), criterion=st.sampled_from(['max_sum', 'k_center']), shift=st.sampled_from([0, 0, 8]), power=st.sampled_from([0, -60, 60]), seed=seeds)
def test_select_exact_where_rounding_is_none(n, d, k, criterion, shift, power, seed):
    "Signed unit vectors have cosines -1, 0 and 1, whole numbers whole squared distances: picks and their many ties are those of integers."
    g, k = torch.Generator().manual_seed(seed), min(k, n)
    i, s = torch.randint(d, (n,), generator=g), torch.randint(0, 2, (n,), generator=g)*2 - 1
    x = torch.zeros(n, d).scatter_(1, i[:, None], s[:, None].float())
    def by_hand(dist):
        picks = [n//2]
        while len(picks) < k:
            value = [-1 if j in picks else (sum if criterion == 'max_sum' else min)(int(dist[j, c]) for c in picks) for j in range(n)]
            picks.append(value.index(max(value)))
        return picks
    assert greedy_select(x[None]*2.**power, k, criterion=criterion, start=n//2, impl=IMPL)[0].tolist() == by_hand((1 - x @ x.T).round())
    if criterion == 'k_center' and n & (n - 1) == 0: # the center of a power of two of whole numbers is a short fraction
        y = torch.randint(-3, 4, (n, d), generator=g).float() + shift
        assert greedy_select(y[None]*2.**power, k, criterion=criterion, metric='euclidean', start=n//2, impl=IMPL)[0].tolist() == by_hand(((y[:, None] - y[None])**2).sum(-1))

def test_select_refuses_broken_sequences():
    "Values are refused on a CPU; the operator is what a GPU runs: -1 for the whole sequence, the others as they were."
    x, alive = randn(3, 20, 5, seed=0), torch.ones(3, 20, dtype=torch.bool)
    for total, metric in itertools.product((True, False), ('cosine', 'euclidean')):
        want = _select_op(x, alive, None, None, 6, metric, total, INTERPRETED)
        for bad in (math.nan, math.inf, *((0,) if metric == 'cosine' else ())):
            y = x.clone(); y[1, 4] = bad
            out = _select_op(y, alive, None, None, 6, metric, total, INTERPRETED)
            assert (out[1] == -1).all() and torch.equal(out[[0, 2]], want[[0, 2]])
            hole = alive.clone(); hole[1, 4] = False
            assert (_select_op(y, hole, None, None, 6, metric, total, INTERPRETED) >= 0).all()
        few = alive.clone(); few[2, 3:] = False # three tokens for six picks
        out = _select_op(x, few, None, None, 6, metric, total, INTERPRETED)[2]
        assert (out[:3] >= 0).all() and (out[3:] == -1).all()
        assert (_select_op(x, alive, None, torch.tensor([0, 99, -1]), 6, metric, total, INTERPRETED)[1:] == -1).all()
        w = torch.ones(3, 20); w[0, 3] = math.nan
        assert (_select_op(x, alive, w, None, 6, metric, total, INTERPRETED)[0] == -1).all()

@pytest.mark.skipif(INTERPRETED, reason='about the torch implementation')
def test_select_table_and_steps_agree():
    "The two ways of making a column; a chunked batch; two threads."
    x, alive = randn(5, 200, 24, seed=0), torch.ones(5, 200, dtype=torch.bool)
    for metric, total in itertools.product(('cosine', 'angle', 'euclidean'), (True, False)):
        start = torch.zeros(5, dtype=torch.long)
        a, b = (select._select(x, alive, None, start, 60, metric, total, t, False) for t in (True, False))
        assert (a == b).float().mean() > .9 and torch.equal(a[:, :10], b[:, :10]) # equal but for near ties
    whole = greedy_select(x, 60, start=0)
    assert torch.equal(whole, torch.cat([greedy_select(y[None], 60, start=0) for y in x]))
    before = torch.get_num_threads()
    try: torch.set_num_threads(2); assert torch.equal(whole, greedy_select(x, 60, start=0))
    finally: torch.set_num_threads(before)
    assert select._table_pays(2880, 288, 4096, torch.device('cuda')) and not select._table_pays(16384, 16, 4096, torch.device('cuda')) and not select._table_pays(20000, 9000, 64, torch.device('cuda'))

@pytest.mark.parametrize('metric', ['chordal', 'angle'])
def test_select_guarantee(metric):
    "Half of the best sum and twice the best radius, from every start, for a true metric."
    for seed in range(6):
        x = randn(7, 2 + seed % 2, seed=seed)*torch.logspace(0, 1.5, 7)[:, None] + seed
        dist = distances(x, metric, False).fill_diagonal_(0)
        total, radius = lambda s: float(dist[list(s)][:, list(s)].sum()), lambda s: float(dist[list(s)].amin(0).max())
        for k in (2, 3, 4):
            best_sum, best_radius = max(map(total, itertools.combinations(range(7), k))), min(map(radius, itertools.combinations(range(7), k)))
            for i in range(7):
                assert total(greedy_select(x[None], k, metric=metric, start=i, impl=IMPL)[0].tolist()) >= best_sum/2 - 1e-6
                assert radius(greedy_select(x[None], k, metric=metric, start=i, criterion='k_center', impl=IMPL)[0].tolist()) <= 2*best_radius + 1e-6

# --- match_and_merge, unmerge_groups

@cases
@given(b=st.integers(1, 3), n=size(70), c=size(20), d=size(20), dtype=dtypes, layout=layouts, n_prefix=st.integers(0, 4), own=st.booleans(), sized=st.booleans(), part=st.floats(0, 1), seed=seeds)
def test_match_and_merge(b, n, c, d, dtype, layout, n_prefix, own, sized, part, seed):
    "Groups are those of a greedy search in float64 to within rounding; tokens are their weighted means; nothing is lost."
    g, n_prefix = torch.Generator().manual_seed(seed), min(n_prefix, n)
    x, m = lay(randn(b, n, c, seed=seed).to(dtype), layout), randn(b, n, d, seed=seed + 1).to(dtype)
    w = torch.rand(b, n, generator=g) + .5 if sized else None
    rest = torch.arange(n_prefix, n)
    to = rest[torch.rand(len(rest), generator=g) < .3] if own else rest[rest % 2 == 1]
    if own and not len(to): own, to = False, rest[rest % 2 == 1]
    a = torch.tensor([i for i in rest.tolist() if i not in to.tolist()], dtype=torch.long)
    r = int(part*len(a)) if len(to) else 0
    y, size, group = match_and_merge(x, r, metric=m, size=w, n_prefix=n_prefix, receivers=to[torch.randperm(len(to), generator=g)].sort()[0] if own else None, impl=IMPL)
    assert y.shape == (b, n - r, c) and y.dtype == dtype and size.shape == (b, n - r) and group.shape == (b, n)
    one = torch.ones(b, n, dtype=torch.float64) if w is None else w.double()
    on = torch.nn.functional.one_hot(group, n - r).double().mT*one[:, None] # (b, n - r, n)
    torch.testing.assert_close(size.double(), on.sum(-1), rtol=1e-5, atol=1e-5); torch.testing.assert_close(size.double().sum(1), one.sum(1), rtol=1e-5, atol=1e-5)
    want = on @ x.double()/on.sum(-1, keepdim=True)
    assert ((y.double() - want).abs() <= (2*n + 8)*U*(on @ x.double().abs()/on.sum(-1, keepdim=True)) + torch.finfo(dtype).eps*want.abs() + torch.finfo(dtype).smallest_normal).all()
    u = (m.double()/m.double().norm(dim=-1, keepdim=True))
    for i in range(b):
        c_ = u[i][a] @ u[i][to].T if len(a) and len(to) else torch.zeros(len(a), 0)
        places = group[i][to]
        gone = [j for j in a.tolist() if group[i, j] in places.tolist()] # senders that sit with a receiver
        assert len(gone) == r
        kept = torch.tensor([j for j in range(n) if j not in gone], dtype=torch.long)
        assert torch.equal(group[i][kept], torch.arange(n - r)) # in their old order
        err = 4*(d + 16)*U
        best = dict(zip(a.tolist(), c_.amax(1).tolist())) if len(to) and len(a) else {}
        for j in gone:
            mine = [t for t in range(len(to)) if places[t] == group[i, j]]
            assert best[j] - float(c_[a.tolist().index(j), mine[0]]) <= err
        left = [best[j] for j in a.tolist() if j not in gone and j in best]
        if gone and left: assert min(best[j] for j in gone) >= max(left) - err

@cases
@given(b=st.integers(1, 3), n=size(90), c=size(40), g=size(20), dtype=dtypes, layout=layouts, seed=seeds)
def test_unmerge(b, n, c, g, dtype, layout, seed):
    y, group = lay(randn(b, g, c, seed=seed).to(dtype), layout), torch.randint(-1, g, (b, n), generator=torch.Generator().manual_seed(seed))
    out = unmerge_groups(y, group, impl=IMPL)
    assert out.dtype == dtype and torch.equal(out, torch.stack([torch.stack([y[i, k] if k >= 0 else torch.zeros(c, dtype=dtype) for k in group[i]]) for i in range(b)]))
    y = y.clone().requires_grad_(); dx = randn(b, n, c, seed=seed + 1).to(dtype)
    unmerge_groups(y, group, impl=IMPL).backward(dx)
    assert torch.equal(y.grad, merge_groups(dx, group, g, mode='sum', impl=IMPL))

def test_merge_a_broken_metric():
    "On a GPU, and inside a compiled graph, a sequence whose metric holds NaN comes out as NaN, not as some other merge."
    x, m = randn(2, 20, 3, seed=0), randn(2, 20, 4, seed=1)
    good = match_and_merge(x, 5, metric=m, impl=IMPL)
    m[1, 6, 2] = math.nan
    with pytest.raises(ValueError, match='NaN'): match_and_merge(x, 5, metric=m, impl=IMPL)
    if INTERPRETED: return
    y = torch.compile(lambda x, m: match_and_merge(x, 5, metric=m), fullgraph=True, backend='aot_eager')(x, m)
    torch.testing.assert_close(y.x[0], good.x[0]); assert y.x[1].isnan().all() and y.size[1].isnan().all()

@pytest.mark.skipif(INTERPRETED, reason='other libraries')
@pytest.mark.parametrize('h,w', [(8, 8), (9, 7), (6, 10)])
def test_grid_merge_is_tomesd(h, w):
    soft = pytest.importorskip('tomesd.merge').bipartite_soft_matching_random2d
    x = randn(2, h*w, 6, seed=h)
    for r in (1, h*w//4, h*w//2):
        merge, unmerge = soft(x, w, h, 2, 2, r, no_rand=True)
        m = match_and_merge(x, r, receivers=grid_receivers(h, w))
        torch.testing.assert_close(unmerge_groups(m.x, m.group), unmerge(merge(x)))

def test_operators_are_registered_well():
    x, alive, ids, k = randn(2, 30, 6, seed=0), torch.arange(60).view(2, 30) % 7 > 0, torch.arange(60).view(2, 30) % 9, INTERPRETED
    for args in [(x, alive, None, None, 5, 'cosine', True, k), (x, alive, torch.rand(2, 30), torch.tensor([1, 2]), 5, 'euclidean', False, k)]: torch.library.opcheck(_select_op, args)
    torch.library.opcheck(_unmerge_op, (randn(2, 8, 3, seed=1).requires_grad_(), ids, k))

@pytest.mark.skipif(INTERPRETED, reason='the graph is the same for both')
def test_compiles_without_a_graph_break():
    def step(x):
        m = match_and_merge(x, 7, n_prefix=1)
        return unmerge_groups(m.x, m.group).square().sum(), (m.size, m.group, greedy_select(x, 9, criterion='k_center', weight=x[..., 0].exp()))
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend='aot_eager')):
        x = randn(2, 30, 6, seed=0).requires_grad_()
        y, rest = f(x)
        results.append([y, *rest, *torch.autograd.grad(y, x)])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

@pytest.mark.skipif(INTERPRETED, reason='about the torch implementation')
def test_no_table_in_memory():
    "Few of many tokens: nothing of n×n. The same call by a table is seen to hold it."
    script = """
import torch
from tokbook.bench import peak_bytes
from tokbook.kernels import greedy_select
x = torch.randn(1, 8192, 8)
greedy_select(x[:, :64], 4)
print(peak_bytes(lambda: greedy_select(x, 20)), peak_bytes(lambda: x @ x.mT))
"""
    ours, table = map(int, subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split())
    assert table > .9*4*8192**2 and ours < table/20

# --- Triton

@pytest.mark.skipif(INTERPRETED, reason='starts this process')
def test_triton(): interpret(__file__)

@pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')
def test_kernels_compile_for_a_gpu():
    from tokbook.kernels import merging
    for bn, warps, total, weight in ((16, 4, True, True), (4096, 8, False, False), (16384, 16, True, True)):
        types = dict(table_ptr='*fp32', value_ptr='*fp32', weight_ptr='*fp32', first_ptr='*i64', out_ptr='*i64', n='i32', k='i32')
        assert 'atom' not in cubin(select._pick_kernel, types, num_warps=warps, BN=bn, TOTAL=total, WEIGHT=weight)
    cubin(merging._unmerge_kernel, dict(y_ptr='*bf16', bins_ptr='*i64', out_ptr='*bf16', n='i32', g='i32', c='i32'), BC=1024)
