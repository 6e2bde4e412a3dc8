"KARL: what holds for every grid, every mask and every budget."
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from tokbook.codec import ImageTokenizer, PatchDecoder, Tokens, evaluate_tokenizer, keep_mask
from tokbook.image.karl import (EPSILONS, EpsilonGrid, HaltingHead, KARLTokenizer, brute_force_kc, budget_errors, complexity_profile, draw_packed, halt_attention_mask,
                                halting_loss, halting_prior, pack_kept, search_budget, structure_score)
from tokbook.quantize import FSQ, VectorQuantize

few = settings(max_examples=25, deadline=None)

@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True))
def test_grid_rounds_up(errs, values):
    "The least grid value that is not below, by definition."
    values = sorted(v/1000 for v in values); grid = EpsilonGrid(3, values); v = grid.values.tolist()
    for e, i in zip(torch.tensor(errs).tolist(), grid.index(torch.tensor(errs)).tolist()):
        assert i == next((j for j, o in enumerate(v) if o >= e), len(v) - 1)
    assert grid(torch.tensor(errs)).shape == (len(errs), 1, 3)

@few
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6), st.sampled_from(['per_group', 'pooled']))
def test_halting_loss_by_loops(b, n, seed, how):
    g = torch.Generator().manual_seed(seed); logits = 2*torch.randn(b, n, generator=g, dtype=torch.float64); T = torch.randint(1, n + 1, (b,), generator=g)
    total = 0.
    for row, t in zip(logits, T.tolist()):
        bce = [-math.log(1 - s) if i < t else -math.log(s) for i, s in enumerate(row.sigmoid().tolist())]
        groups = [bce[:t], bce[t:]] if how == 'per_group' else [bce]
        total += sum(sum(o)/len(o) for o in groups if o)
    assert abs(halting_loss(logits, T, reduce=how).item() - total/b) < 1e-9

@pytest.mark.parametrize('how', ['per_group', 'pooled'])
@pytest.mark.parametrize('n,budgets', [(3, None), (8, None), (16, range(1, 24)), (5, [2, 2, 4])])
def test_prior_is_the_optimum(n, budgets, how):
    "No other probabilities have a smaller expected loss: the gradient in the logits is zero where it can be."
    w = halting_prior(n, budgets, reduce=how); T = [min(t, n) for t in budgets or range(1, n + 1)]
    logits = w.clamp(1e-12, 1 - 1e-12).logit()[None].requires_grad_()
    (sum(halting_loss(logits, t, reduce=how) for t in T)/len(T)).backward()
    assert logits.grad.abs().max() < 1e-9

@few
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_masked_packed_alone(b, n, seed):
    g = torch.Generator().manual_seed(seed); torch.manual_seed(seed)
    dec = PatchDecoder(8, 1, 4, 3, latents=n, width=8, depth=2, heads=2).double(); z = torch.randn(b, n, 3, generator=g).double()
    keep = torch.rand(b, n, generator=g) < .5; keep |= F.one_hot(torch.randint(n, (b,), generator=g), n).bool()
    y = dec(z, keep); other = torch.where(keep[..., None], z, torch.randn(b, n, 3, generator=g).double())
    torch.testing.assert_close(dec(other, keep), y, rtol=0, atol=1e-11)
    torch.testing.assert_close(draw_packed(dec, other, keep), y, rtol=0, atol=1e-11)
    i, real = pack_kept(keep)
    assert real.sum(1).tolist() == keep.sum(1).tolist() and all(i[r][real[r]].tolist() == keep[r].nonzero()[:, 0].tolist() for r in range(b))

@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_mask_for_torch_attention(b, t, p, heads, seed):
    "In PyTorch's own attention every head of every picture obeys the picture's mask."
    g = torch.Generator().manual_seed(seed); torch.manual_seed(seed); halted = torch.rand(b, t, generator=g) < .5
    mha = torch.nn.MultiheadAttention(4*heads, heads, batch_first=True).eval(); v = torch.randn(b, p + t, 4*heads, generator=g)
    with torch.no_grad():
        all_ = mha(v, v, v, attn_mask=halt_attention_mask(halted, p, heads=heads))[0]
        for i in range(b): torch.testing.assert_close(all_[i:i + 1], mha(v[i:i+1], v[i:i+1], v[i:i+1], attn_mask=halt_attention_mask(halted[i:i+1], p, heads=heads))[0], rtol=0, atol=1e-5)
    seen = halt_attention_mask(halted, p)
    assert seen.shape == (b, 1, p + t, p + t) and seen.diagonal(dim1=-2, dim2=-1).all() and torch.equal(seen, seen.mT)

class Errors:
    "A tokenizer whose error with k tokens is given: column k of a table."
    def __init__(self, table): self.table, self.num_tokens = table, table.shape[1]
    def encode(self, x, keep=None): k = keep or self.num_tokens; return Tokens(torch.arange(len(x))[:, None].expand(-1, k))
    def decode(self, tokens):
        k = tokens.count; return self.table[tokens.values[:, 0], k - 1][:, None, None, None]

@few
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6), st.floats(0, 1))
def test_search_finds_the_least(b, n, seed, eps):
    "Brute force against loops; more budget changes nothing once one was enough; bisection agrees where errors fall."
    table = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)); tok, x = Errors(table), torch.zeros(b, 1, 1, 1)
    assert torch.equal(budget_errors(tok, x), table)
    kc, met = brute_force_kc(tok, x, eps)
    eps32 = torch.tensor(eps).item()
    for row, k, ok in zip(table.tolist(), kc.tolist(), met.tolist()):
        hits = [j + 1 for j, e in enumerate(row) if e <= eps32]
        assert (k, ok) == ((hits[0], True) if hits else (n, False))
    for T in range(1, n + 1):
        short, ok = brute_force_kc(tok, x, eps, range(1, T + 1)); assert torch.equal(short[ok], kc[ok]) and torch.equal(ok, met & (kc <= T))
    fall = Errors(table.sort(1, descending=True).values); k, draws = search_budget(fall, x, eps)
    assert torch.equal(k, brute_force_kc(fall, x, eps)[0]) and (draws <= math.ceil(math.log2(n)) if n > 1 else draws == 0).all()

@pytest.mark.parametrize('quantizer', [None, 'fsq', 'vq'])
def test_it_is_an_image_tokenizer(quantizer):
    "The contract of the part: encode, decode, counts, bits, evaluation."
    torch.manual_seed(0)
    q = dict(fsq=lambda: FSQ([8, 8, 4]), vq=lambda: VectorQuantize(3, 16)).get(quantizer, lambda: None)()
    tok = KARLTokenizer(16, 3, 4, latents=6, width=16, dim=3, quantizer=q, depth=1).eval(); x = torch.rand(5, 3, 16, 16)
    for t in (tok.encode(x), tok.encode(x, 2), tok.encode(x, torch.tensor([1, 6, 2, 2, 5])), tok.encode(x, eps=.2, budget=4)):
        assert isinstance(t, Tokens) and tok.decode(t).shape == x.shape and (t.count >= 1).all()
    assert (complexity_profile(tok, x, EPSILONS[::6]) <= 6).all() and structure_score(tok, x, 1, 6).shape == (5,)
    row = evaluate_tokenizer(tok, x, keep=3); assert row['tokens'] == 3 and tok.num_tokens == 6
    one = torch.cat([tok.decode(tok.encode(x[i:i + 1])) for i in range(5)]); torch.testing.assert_close(one, tok.decode(tok.encode(x)), rtol=0, atol=1e-5)
    out = tok.train().loss(x, generator=torch.Generator().manual_seed(1)); out['loss'].backward(); assert out['loss'].isfinite()

def test_bad_input():
    tok = KARLTokenizer(8, 1, 4, latents=4, width=8, depth=1, dim=2); x = torch.rand(2, 1, 8, 8)
    for bad in (lambda: EpsilonGrid(4, ()), lambda: EpsilonGrid(0), lambda: HaltingHead(4, 0), lambda: halting_prior(4, []), lambda: halt_attention_mask(torch.zeros(1, 2).bool(), 1, heads=0),
                lambda: KARLTokenizer(8, 1, 4, latents=4, eps=-1.), lambda: KARLTokenizer(8, 1, 4, latents=4, halt=-1.), lambda: tok.encode(x, eps=torch.tensor([.1, math.nan])),
                lambda: tok.encode(x[:, :, :4]), lambda: tok.encode(x, torch.tensor([0, 1])), lambda: tok.ltc(x, 0, torch.zeros(2)), lambda: draw_packed(PatchDecoder(8, 1, 4, 2), x, keep_mask(1, 4, 2))):
        with pytest.raises(ValueError): bad()
    with pytest.raises(TypeError): tok.encode(x, torch.tensor([1., 2.]))
