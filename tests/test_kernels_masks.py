"Masks against sentences in plain Python, their blocks against the table, both implementations of attention under them against a softmax in float64."
import itertools, math, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from kernel_tools import cases, dtypes, randn, seeds, size
from tokbook.kernels import Mask, blocks, causal, packed, ordered, ordered_attention, padding, prefix, tree, window
from torch.nn.attention.flex_attention import create_block_mask

def ints(lo, hi, *shape, seed): return torch.randint(lo, hi, shape, generator=torch.Generator().manual_seed(seed))

def written(say, b, q, kv): return torch.tensor([[[[bool(say(n, i, j)) for j in range(kv)] for i in range(q)]] for n in range(b)])

def leaves(b, t, seed): # a mask of every kind, and the sentence that it is
    ids, par = ints(-1, 4, b, t, seed=seed), [[-1] + [int(ints(-1, i, 1, seed=seed + 7*i + n)) for i in range(1, t)] for n in range(b)]
    real, order = ints(0, 3, b, t, seed=seed + 1) > 0, torch.stack([torch.randperm(t, generator=torch.Generator().manual_seed(seed + n)) for n in range(b)])
    rank, k, some, w = order.argsort(-1), int(ints(0, t + 2, 1, seed=seed)), ints(0, t + 1, b, seed=seed + 2), int(ints(0, t, 1, seed=seed + 3))
    def above(n, q, kv): # climb
        while q > kv: q = par[n][q]
        return q == kv
    return [(causal(), lambda n, q, j: j <= q), (window(w), lambda n, q, j: abs(q - j) <= w), (prefix(k), lambda n, q, j: j < k), (prefix(some), lambda n, q, j: j < some[n]),
            (padding(real), lambda n, q, j: real[n, j]), (padding(real[0]), lambda n, q, j: real[0, j]), (packed(ids), lambda n, q, j: ids[n, q] == ids[n, j] >= 0),
            (blocks(ids), lambda n, q, j: ids[n, j] <= ids[n, q]), (blocks(ids, strict=True), lambda n, q, j: ids[n, j] < ids[n, q]),
            (ordered(order), lambda n, q, j: rank[n, j] <= rank[n, q]), (ordered(order, strict=True), lambda n, q, j: rank[n, j] < rank[n, q]), (tree(torch.tensor(par)), above)]

@cases
@given(b=st.integers(1, 3), t=st.integers(1, 13), picks=st.lists(st.integers(0, 11), min_size=1, max_size=3), signs=st.lists(st.sampled_from('&|'), min_size=2, max_size=2), no=st.lists(st.booleans(), min_size=3, max_size=3), seed=seeds)
def test_algebra(b, t, picks, signs, no, seed):
    "Any expression of up to three masks means what the same expression of sentences means."
    all_of = leaves(b, t, seed % 10**6)
    mask = say = None
    for i, p in enumerate(picks):
        m, s = all_of[p]
        if no[i]: m, s = ~m, lambda n, q, j, s=s: not s(n, q, j)
        if mask is None: mask, say = m, s
        elif signs[i - 1] == '&': mask, say = mask & m, lambda n, q, j, a=say, s=s: a(n, q, j) and s(n, q, j)
        else: mask, say = mask | m, lambda n, q, j, a=say, s=s: a(n, q, j) or s(n, q, j)
    want = written(say, b, t, t)
    assert torch.equal(mask.dense(t, batch=b), want) and mask.batch in (None, b)
    k = t//2 + 1 # the last k queries
    assert torch.equal(mask.dense(k, t, batch=b), want[:, :, t - k:]) and torch.equal(mask.dense(k, t, batch=b, start=0), want[:, :, :k])
    where = ints(0, t, k, seed=seed)
    assert torch.equal(mask.at(where).dense(k, t, batch=b), want[:, :, where]) and torch.equal(mask.at(where, where).dense(k, batch=b), want[:, :, where][..., where])

@cases
@given(b=st.integers(1, 2), t=size(70), q=size(70), block=st.sampled_from([1, 3, 16, 32]), pick=st.integers(0, 11), other=st.integers(0, 11), seed=seeds)
def test_blocks_of_a_mask(b, t, q, block, pick, other, seed):
    q, all_of = min(q, t), leaves(b, t, seed % 10**6)
    mask = all_of[pick][0] & ~all_of[other][0] if seed % 2 else all_of[pick][0] | all_of[other][0]
    table, tiles = mask.dense(q, t), mask.tiles(q, t, block=block)
    pad = F.pad(table, (0, -t % block, 0, -q % block)).unfold(2, block, block).unfold(3, block, block) # (b, h, qb, kvb, block, block)
    assert torch.equal(tiles, pad.any(-1).any(-1).to(torch.uint8) + pad.all(-1).all(-1))
    ours, rule = mask.block_mask(q, t, block=block), mask.rule
    theirs = create_block_mask(lambda b, h, i, j: rule(b, h, i + t - q, j), mask.batch, None, q, t, device='cpu', BLOCK_SIZE=block)
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks) and torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)

def softmax_attention(q, k, v, m): # float64, written out
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1]//k.shape[1], 1) for x in (k, v))
    w = (q @ k.mT/q.shape[-1]**.5).masked_fill(~m, -math.inf).softmax(-1)
    return torch.where(m.any(-1, keepdim=True), w, 0.) @ v

def attend(b, h, g, t, q, d, e, dtype, pick, other, seed, impl):
    q, g, all_of = min(q, t), math.gcd(g, h), leaves(b, t, seed % 10**6)
    mask = all_of[pick][0] & all_of[other][0]
    x, y, z = randn(b, h, q, d, seed=seed).to(dtype), randn(b, g, t, d, seed=seed + 1).to(dtype), randn(b, g, t, e, seed=seed + 2).to(dtype)
    out, m = ordered_attention(x, y, z, mask, impl=impl), mask.dense(q, t)
    assert out.shape == (b, h, q, e) and out.dtype == dtype
    want = softmax_attention(x, y, z, m)
    few = {} if dtype in (torch.float32, torch.float64) else dict(rtol=0, atol=4*torch.finfo(dtype).eps*(1 + float(z.abs().max())))
    torch.testing.assert_close(out.to(want.dtype), want, **(few or dict(rtol=1e-5, atol=2e-6)))
    assert (out.masked_select(~m.any(-1)[..., None].expand(b, h, q, e)) == 0).all() # nobody to look at

@cases
@given(b=st.integers(1, 2), h=st.sampled_from([1, 2, 4]), g=st.sampled_from([1, 2]), t=size(70), q=size(70), d=st.integers(1, 20), e=st.integers(1, 20), dtype=dtypes, pick=st.integers(0, 11), other=st.integers(0, 11), seed=seeds)
def test_attention(b, h, g, t, q, d, e, dtype, pick, other, seed): attend(b, h, g, t, q, d, e, dtype, pick, other, seed, 'dense')

@pytest.mark.parametrize('pick', range(0, 12, 3))
def test_flex(pick): # PyTorch traces each rule anew, which takes a second
    attend(2, 4, 2, 70, 70 - pick, 8, 8, torch.float32, pick, (pick*5 + 3) % 12, pick, 'flex')

@pytest.mark.parametrize('t', [40, 700]) # one strip, several
def test_gradient(t):
    "Through the strips, against autograd through the softmax written out. A query without a key sends nothing."
    ids, order = ints(-1, 5, 2, t, seed=0), torch.randperm(t, generator=torch.Generator().manual_seed(1))
    x = [randn(2, 2, t, 4, seed=i).double().requires_grad_() for i in range(3)]
    for mask in (causal() & packed(ids), ordered(order, strict=True), blocks(ids, strict=True) & window(30)):
        for a, b in zip(*(torch.autograd.grad(f.sin().sum(), x) for f in (ordered_attention(*x, mask), softmax_attention(*x, mask.dense(t))))): torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match='backward'): ordered_attention(*x, causal(), impl='flex')

def test_heads():
    slope = torch.tensor([0, 2, 5])
    local = Mask(lambda b, h, q, kv: (q - kv).abs() <= slope[h], 'local', heads=3)
    m = (local & causal()).dense(9)
    for h in range(3): assert torch.equal(m[0, h], (window(int(slope[h])) & causal()).dense(9)[0, 0])
    q = randn(2, 3, 9, 4, seed=0)
    torch.testing.assert_close(ordered_attention(q, q, q, local & causal()), softmax_attention(q, q, q, m).float())
    with pytest.raises(ValueError, match='3 heads'): ordered_attention(q[:, :2], q[:, :2], q[:, :2], local)
    with pytest.raises(TypeError): causal() & 3

def test_every_tree_of_six():
    for par in itertools.product(*(range(-1, i) for i in range(6))):
        up = torch.zeros(6, 6, dtype=torch.bool)
        for q in range(6):
            up[q, q] = True
            if par[q] >= 0: up[q] |= up[par[q]]
        assert torch.equal(tree(torch.tensor(par)).dense(6)[0, 0], up)
        if par[3] == 1: assert torch.equal(tree(torch.tensor(par), past=torch.tensor([2, 0])).dense(6)[1, 0], up)

def test_permuting_tokens_permutes_attention():
    "Siblings of a set, and everything else that only ids decide, may be stored in any order."
    ids, q, perm = ints(0, 4, 30, seed=0).sort()[0], randn(1, 2, 30, 8, seed=1), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    for make in (packed, blocks, lambda i: blocks(i, strict=True), lambda i: ~packed(i) | window(0)):
        a, b = ordered_attention(q, q, q, make(ids))[:, :, perm], ordered_attention(*[q[:, :, perm]]*3, make(ids[perm]))
        torch.testing.assert_close(a, b)

def test_cutting_the_registers_changes_nothing_before():
    q = randn(1, 2, 40, 8, seed=0)
    whole, cut = (ordered_attention(*[q[:, :, :n]]*3, causal() | prefix(24)) for n in (40, 30))
    torch.testing.assert_close(whole[:, :, :30], cut)

def test_blocks_are_built_once():
    m, q = causal() & packed(torch.zeros(40, dtype=torch.long)), randn(1, 1, 40, 8, seed=0)
    ordered_attention(q, q, q, m, impl='flex'); first = m._blocks
    ordered_attention(q, q, q, m, impl='flex'); assert m._blocks is first
    ordered_attention(q[:, :, :20], q, q, m, impl='flex'); assert m._blocks is not first
    assert (~m)._blocks is None

def test_compiles():
    "The dense path without a graph break, and the rule inside FlexAttention's compiled kernel."
    ids, order = ints(0, 3, 2, 150, seed=0), torch.randperm(150, generator=torch.Generator().manual_seed(1))
    q = randn(2, 2, 150, 16, seed=2)
    mask = ordered(order, strict=True) & ~packed(ids) | prefix(torch.tensor([3, 9])) & padding(ids > 0) | tree(torch.arange(150)//2 - 1)
    step = lambda q: ordered_attention(q, q, q, mask, impl='dense')
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend='aot_eager')(q), step(q))
    from torch.nn.attention.flex_attention import flex_attention
    torch.testing.assert_close(torch.compile(flex_attention)(q, q, q, block_mask=mask.block_mask(150)), step(q))

def test_no_square_table():
    "On a CPU neither the list of blocks nor attention makes the whole square; what makes it is seen to."
    script = """
import torch
from tokbook.bench import peak_bytes
from tokbook.kernels import causal, ordered_attention, window
t, m = 16384, causal() & window(64)
q = torch.randn(1, 1, t, 8)
m.tiles(256); ordered_attention(*[q[:, :, :512]]*3, m)
print(*(peak_bytes(f) for f in (lambda: m.tiles(t), lambda: ordered_attention(q, q, q, m), lambda: m.dense(t)))) # the largest last: not every machine can reset the mark
"""
    tiles, attention, dense = map(int, subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split())
    square = 16384**2
    assert dense > .9*square and tiles < square and attention < square, (dense, tiles, attention)
