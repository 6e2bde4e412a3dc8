"""What a notebook is the wrong place for: random numbers against plain integers, the fused loss against float64 on random shapes (both implementations), compilers, other people's models."""
import math
from itertools import permutations
import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from kernel_tools import IMPL, INTERPRETED, U, cases, cubin, interpret, randn, seeds, size
from torch import nn
from tokbook.text.lexinvariant import *
from tokbook.text.lexinvariant import _ce_backward_kernel, _ce_backward_op, _ce_forward_kernel, _ce_op

torch_only = pytest.mark.skipif(INTERPRETED, reason='about the torch implementation')
M = 2**32 - 1

def philox_by_hand(c, k): # python's integers
    (a, b, c, d), (k, l) = c, k
    for _ in range(10):
        p, q = 0xD2511F53*a, 0xCD9E8D57*c
        a, b, c, d = (q >> 32) ^ b ^ k, q & M, (p >> 32) ^ d ^ l, p & M
        k, l = (k + 0x9E3779B9) & M, (l + 0xBB67AE85) & M
    return a, b, c, d

@torch_only
@cases
@given(st.lists(st.integers(0, M), min_size=6, max_size=6))
def test_philox(w):
    t = [torch.tensor(o) for o in w]
    assert tuple(int(o) for o in philox(t[:4], t[4:])) == philox_by_hand(w[:4], w[4:])

@torch_only
@cases
@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(1, 300))
def test_rows_by_hand(seed, v, dim):
    key, got = (seed & M, seed >> 32 & M), {law: random_rows(torch.tensor(seed), torch.tensor(v), dim, law) for law in LAWS}
    assert all(o.shape == (dim,) for o in got.values())
    for d in {0, min(1, dim - 1), dim//2, dim - 1}:
        u = [((w >> 9) + .5)/2**23 for w in philox_by_hand((d//4, v, 0, 0), key)]
        i = d % 4//2*2; r, a = math.sqrt(-2*math.log(u[i])), 2*math.pi*(u[i + 1] - .5)
        assert abs(got['normal'][d] - r*(math.sin if d % 2 else math.cos)(a)) < 2e-5
        w = philox_by_hand((d//128, v, 1, 0), key)[d % 128//32]
        assert got['sign'][d] == 2*(w >> d % 32 & 1) - 1

@st.composite
def problems(draw):
    k = 2 if INTERPRETED else 1 # the interpreter is slow
    b, t, d, v = draw(st.integers(1, 3)), draw(size(40//k)), draw(size(70//k)), draw(size(140//k))
    g = torch.Generator().manual_seed(draw(seeds)); y = torch.randint(v, (b, t), generator=g)
    y[torch.rand(b, t, generator=g) < .2] = -100
    return randn(b, t, d, seed=draw(seeds)), y, torch.randint(-2**62, 2**62, (b,), generator=g), v, randn(b, t, seed=draw(seeds))

def reference(h, y, E, scale, grad): # float64: losses and the gradients of h and of the table
    h, E = h.double().requires_grad_(), E.double().requires_grad_()
    nll = F.cross_entropy((scale*h@E.mT).flatten(0, 1), y.flatten(), reduction='none').view(y.shape)
    return nll.detach(), *torch.autograd.grad((nll*grad).sum(), (h, E))

@cases
@given(problems(), st.sampled_from(LAWS), st.sampled_from([.5, 2.]))
def test_fused_loss(p, law, std):
    h, y, s, v, grad = p; d = h.shape[-1]; h.requires_grad_()
    E = std*random_rows(s[:, None], torch.arange(v), d, law)
    nll = random_cross_entropy(h, y, s, v, law=law, std=std, reduction='none', impl=IMPL)
    dh, = torch.autograd.grad((nll*grad).sum(), h)
    want, dwant, _ = reference(h.detach(), y, E, d**-.5, grad)
    room = 1 + (h.detach().double()[..., None, :]*E.double()[:, None]).abs().sum(-1).amax()*d**-.5 # the largest sum of absolute products
    assert (nll - want).abs().max() <= 32*U*room*math.sqrt(d) + 1e-6
    assert (dh - dwant).abs().max() <= 1e-5*room*max(1, std)

@cases
@given(problems(), st.booleans())
def test_low_precision_and_nan(p, half):
    h, y, s, v, grad = p; h = h.to(torch.float16 if half else torch.bfloat16).requires_grad_()
    nll = random_cross_entropy(h, y, s, v, law='sign', scale=1., std=.25, reduction='none', impl=IMPL) # exact in low precision
    dh, = torch.autograd.grad((nll*grad).sum(), h)
    want, dwant, _ = reference(h.detach(), y, .25*random_rows(s[:, None], torch.arange(v), h.shape[-1], 'sign'), 1., grad)
    assert nll.dtype == torch.float32 and dh.dtype == h.dtype and (nll - want).abs().max() < 1e-4*(1 + want.max())
    assert (dh - dwant).abs().max() <= 2**-6*(1 + dwant.abs().max())
    bad = h.detach().clone(); bad[0, 0, 0] = math.nan
    out = random_cross_entropy(bad, y.clamp(min=0), s, v, reduction='none', impl=IMPL)
    assert out[0, 0].isnan() and not out[0, 1:].isnan().any() and not out[1:].isnan().any()

@torch_only
@cases
@given(problems(), st.sampled_from([0., .3, 1.]), st.integers(0, 4))
def test_learned_rows(p, rho, kept):
    h, y, s, v, grad = p; d = h.shape[-1]; keep = sorted({(17*i + 3) % v for i in range(kept)})
    for full in (False, True):
        e = SemiLexinvariantEmbedding(v, d, keep, rho=rho) if full else RandomEmbedding(v, d, keep)
        if not full and not keep: continue
        x = h.clone().requires_grad_(); nll = e.cross_entropy(s, x, y, reduction='none')
        got = torch.autograd.grad((nll*grad).sum(), (x, e.weight))
        table = e.table(s); want, dh, dE = reference(h, y, table.detach(), d**-.5, grad)
        dw, = torch.autograd.grad((table*dE).sum(), e.weight)
        for a, b in zip((nll, *got), (want, dh, dw)): assert (a - b).abs().max() < 1e-4*(1 + b.abs().max())

@torch_only
def test_tiles_do_not_matter():
    "More tokens than a tile holds, in both directions, and one more than a multiple."
    h, s = randn(5, 300, 64, seed=0).requires_grad_(), torch.arange(5)
    y = torch.randint(8193, (5, 300), generator=torch.Generator().manual_seed(0)); y[:, 0] = 8192
    nll = random_cross_entropy(h, y, s, 8193, reduction='none'); dh, = torch.autograd.grad(nll.sum(), h)
    want, dwant, _ = reference(h.detach(), y, random_rows(s[:, None], torch.arange(8193), 64), 1/8, torch.ones(5, 300))
    assert (nll - want).abs().max() < 1e-5 and (dh - dwant).abs().max() < 1e-5

@torch_only
def test_operations_are_registered():
    h, y, s = randn(2, 5, 8, seed=1).requires_grad_(), torch.randint(9, (2, 5)), torch.arange(2)
    w = randn(9, 8, seed=2).requires_grad_()
    for weight, kept in ((None, []), (w, [2]), (w[:1].detach().requires_grad_(), [4])):
        args = (h, y, s, weight, kept, 9, .4, 1., 'normal', False)
        torch.library.opcheck(_ce_op, args, test_utils=('test_schema', 'test_faketensor', 'test_aot_dispatch_static'), rtol=1e-4, atol=1e-5)
        f = lambda h, y, s: random_cross_entropy(h, y, s, 9, weight=weight, kept=kept, rho=.4)
        want = f(h, y, s); got = torch.compile(f, fullgraph=True, backend='aot_eager')(h, y, s)
        assert torch.allclose(want, got) and torch.allclose(*(torch.autograd.grad(o, h)[0] for o in (want, got)))

@torch_only
def test_same_bits_every_run_and_any_batch():
    e, s = RandomEmbedding(500, 33), torch.tensor([4, 9, 2])
    h, y = randn(3, 7, 33, seed=3), torch.randint(500, (3, 7), generator=torch.Generator().manual_seed(1))
    one = e.cross_entropy(s, h, y, reduction='none')
    assert torch.equal(one, e.cross_entropy(s, h, y, reduction='none'))
    for i in range(3): assert torch.allclose(e.cross_entropy(s[i:i + 1], h[i:i + 1], y[i:i + 1], reduction='none')[0], one[i], atol=1e-6)
    torch.manual_seed(5); a = torch.randint(2**63 - 1, (3,)); torch.manual_seed(5)
    from tokbook.lm import GPT
    torch.manual_seed(0); lm = LexinvariantLM(GPT(1, 32, 1, 2, rope=True), 500, 32)
    torch.manual_seed(5); assert torch.equal(lm(y).seeds, a) # drawn from torch's generator, which `fit` seeds by step

@torch_only
def test_other_peoples_models():
    import transformers as tf
    kw = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    torch.manual_seed(0)
    models = dict(gpt2=tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
                  llama=tf.LlamaForCausalLM(tf.LlamaConfig(**kw, tie_word_embeddings=True)), qwen=tf.Qwen2ForCausalLM(tf.Qwen2Config(**kw, tie_word_embeddings=True)),
                  neox=tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**{k: v for k, v in kw.items() if k != 'num_key_value_heads'})))
    x = torch.randint(40, (2, 12)); mask = torch.arange(12) < torch.tensor([[12], [7]]); perm = torch.randperm(40)
    for name, hf in models.items():
        hf.eval(); lm = LexinvariantLM(hf, 40, 32, keep=(0,)).eval()
        o = lm(x, x, mask=mask); o.loss.backward()
        assert o.nll.shape == (2, 11) and not o.nll[1, 6:].any() and abs(o.loss - math.log(40)) < .3, name
        assert all(p.grad is None for p in hf.get_input_embeddings().parameters()), name # its own table is not used
        assert torch.isfinite(lm.emb.weight.grad).all() and len(lm.emb.weight) == 1
        if name != 'neox':
            tied = LexinvariantLM(hf, 40, 32, rho=0, weight=hf.get_input_embeddings().weight, readout=False, scale=1.).eval()
            with torch.no_grad(): assert torch.allclose(tied(x).logits, hf(x).logits, atol=1e-4), name
    body = LexinvariantLM(models['llama'].model, 40, 32) # a body without a head is taken as it is
    assert body(x, x).loss.isfinite()

@torch_only
def test_refusals():
    with pytest.raises(ValueError, match='reduction'): random_cross_entropy(randn(1, 2, 3, seed=0), torch.zeros(1, 2).long(), torch.zeros(1).long(), 4, reduction='max')
    with pytest.raises(ValueError, match='impl'): random_cross_entropy(randn(1, 2, 3, seed=0), torch.zeros(1, 2).long(), torch.zeros(1).long(), 4, impl='cuda')
    with pytest.raises(RuntimeError, match='triton'): random_cross_entropy(randn(1, 2, 3, seed=0), torch.zeros(1, 2).long(), torch.zeros(1).long(), 4, impl='triton')
    with pytest.raises(TypeError): random_cross_entropy(randn(1, 2, 3, seed=0), torch.zeros(1, 2), torch.zeros(1).long(), 4)
    with pytest.raises(ValueError, match='permutation|each of'): permute_vocab(torch.tensor([0]), torch.tensor([0, 0]))

@torch_only
@cases
@given(st.integers(2, 5), st.integers(1, 6), seeds)
def test_exact_mixture_is_invariant_and_normalized(V, T, seed):
    g = torch.Generator().manual_seed(seed)
    table = {t: torch.rand(*[V]*(t + 1), generator=g, dtype=torch.float64) for t in range(T)} # any law at all: not Markov
    def log_prob(ids): return torch.stack([torch.stack([(table[t][tuple(r[:t])]/table[t][tuple(r[:t])].sum())[r[t]] for t in range(len(r))]) for r in ids.tolist()]).log()
    mix, x = exact_lexinvariant(log_prob, V), torch.randint(V, (3, T), generator=g)
    sigma = torch.randperm(V, generator=g); whole = lambda ids: mix(ids).sum(1)
    assert torch.allclose(whole(sigma[x]), whole(x), atol=1e-12)
    brute = torch.stack([log_prob(torch.tensor(k)[x]).sum(1) for k in permutations(range(V))]).logsumexp(0) - math.lgamma(V + 1)
    assert torch.allclose(whole(x), brute, atol=1e-12)
    assert (whole(x) >= log_prob(x).sum(1) - math.lgamma(V + 1) - 1e-9).all() # the bound, sequence by sequence
    if V**T < 300: assert abs(whole(torch.cartesian_prod(*[torch.arange(V)]*T).view(-1, T)).exp().sum() - 1) < 1e-9

# --- Triton

@torch_only
def test_triton(): interpret(__file__)

@torch_only
def test_kernels_compile_for_a_gpu():
    base = dict(seed_ptr='*i64', y_ptr='*i64', lse_ptr='*fp32', std='fp32', T='i32', D='i32', V='i32')
    for dtype, sign, (bt, bd, w) in (('*fp32', True, (128, 64, 8)), ('*bf16', False, (64, 64, 4))):
        kw = dict(num_warps=w, BT=bt, BV=64, BD=bd, SIGN=sign, PRECISION='ieee', UP=False)
        cubin(_ce_forward_kernel, dict(base, h_ptr=dtype, nll_ptr='*fp32'), **kw)
        cubin(_ce_backward_kernel, dict(base, h_ptr=dtype, grad_ptr='*fp32', dh_ptr='*fp32'), **kw)
