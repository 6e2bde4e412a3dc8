"""Layers and language models against transformers, float64 and themselves: what is too broad for a notebook."""
import copy, os
import pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.layers import Attention, ConvDecoder, ConvEncoder, KVCache, Transformer, patchify, rotary, unpatchify
from tokbook.lm import GPT, CausalLM, HFCausalLM, LMCache, as_causal_lm, filter_logits, generate, load_gpt2

torch.set_num_threads(1)
tf = pytest.importorskip('transformers')
V, T = 40, 12
some = settings(max_examples=25, deadline=None, derandomize=True)

def sharpen(m): # large enough weights that position and context matter
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1: p.mul_(4)
    return m.eval()

def family(name):
    "A randomly initialized model of a transformers family, small."
    torch.manual_seed(0)
    base = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    kv = dict(num_key_value_heads=2, head_dim=8)
    cfg = dict(
        GPT2=lambda: tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
        Llama=lambda: tf.LlamaConfig(**base, **kv),
        Mistral=lambda: tf.MistralConfig(**base, **kv, sliding_window=5),          # sliding window
        Qwen3=lambda: tf.Qwen3Config(**base, **kv),                                # normalized queries and keys
        Gemma2=lambda: tf.Gemma2Config(**base, **kv, final_logit_softcapping=2., sliding_window=5), # soft cap, scaled embeddings
        Cohere=lambda: tf.CohereConfig(**base, num_key_value_heads=2, logit_scale=.3),  # scaled logits
        Granite=lambda: tf.GraniteConfig(**base, num_key_value_heads=2, logits_scaling=3., embedding_multiplier=2.),
        GPTNeoX=lambda: tf.GPTNeoXConfig(**base, rotary_pct=.5),                   # partly rotary
        OPT=lambda: tf.OPTConfig(vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=1), # embedding narrower than the model
        Bloom=lambda: tf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), # relative biases, no positions
    )[name]()
    return sharpen(tf.AutoModelForCausalLM.from_config(cfg))

FAMILIES = 'GPT2 Llama Mistral Qwen3 Gemma2 Cohere Granite GPTNeoX OPT Bloom'.split()
GPTS = dict(learned=dict(), rotary=dict(rope=True), modern=dict(rope=True, qk_norm=True, norm='rms', bias=False, tie=False))

def build(name):
    torch.manual_seed(0)
    return sharpen(GPT(V, 32, 2, 4, 64, **GPTS[name])) if name in GPTS else HFCausalLM(family(name))

@pytest.fixture(scope='module')
def zoo(): return {}
@pytest.fixture(params=[*GPTS, *FAMILIES])
def lm(request, zoo):
    if request.param not in zoo: zoo[request.param] = build(request.param)
    return zoo[request.param]

def ids(b=3, t=T, seed=0): return torch.randint(2, V, (b, t), generator=torch.Generator().manual_seed(seed))
def close(a, b, tol=2e-4): assert a.shape == b.shape and (a - b).abs().max() < tol*max(1, b.abs().max()), (a - b).abs().max()
def pieces(lm, x, cuts, **kw):
    cache, out = None, []
    for p in x.split(cuts, 1): o = lm(p, cache=cache, use_cache=True); cache = o.cache; out.append(o.logits)
    return torch.cat(out, 1), cache

@torch.no_grad()
def test_same_as_the_model_itself(lm):
    if not isinstance(lm, HFCausalLM): pytest.skip('the adapter only')
    x = ids(); close(lm(x).logits, lm.model(x).logits, 1e-6); assert lm(x).logits.shape[-1] == lm.vocab_size

@torch.no_grad()
def test_embeddings_and_head(lm):
    x = ids(); o = lm(x)
    assert isinstance(lm, CausalLM) and lm.embed(x).shape[-1] == lm.dim
    close(lm(embeds=lm.embed(x)).logits, o.logits); close(lm.head(o.hidden), o.logits)

@torch.no_grad()
@pytest.mark.parametrize('cuts', [[1]*T, [7, 5], [3, 1, 6, 2]])
def test_cache(lm, cuts):
    got, cache = pieces(lm, ids(), cuts); close(got, lm(ids()).logits); assert len(cache) == T

@torch.no_grad()
@pytest.mark.parametrize('lengths', [(12, 9, 4), (5, 12, 1)])
def test_left_padding(lm, lengths):
    x = ids(); mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()
    alone = [lm(x[i:i+1, T-n:]).logits for i, n in enumerate(lengths)]
    whole, emb = lm(x, mask=mask).logits, lm(embeds=lm.embed(x), mask=mask).logits
    o = lm(x[:, :T-1], mask=mask[:, :T-1], use_cache=True); last = lm(x[:, -1:], mask=mask[:, -1:], cache=o.cache).logits
    for i, n in enumerate(lengths):
        close(whole[i:i+1, T-n:], alone[i]); close(emb[i:i+1, T-n:], alone[i]); close(last[i:i+1], alone[i][:, -1:])

@torch.no_grad()
def test_crop_and_select(lm):
    if type(lm).__name__ == 'HFCausalLM' and getattr(lm.model.config, 'sliding_window', None): pytest.skip('a sliding window forgets: transformers cannot crop it at will')
    x = ids(); _, cache = pieces(lm, x, [8, 4]); trunk = copy.deepcopy(cache)
    close(lm(x[:, 5:], cache=cache.crop(5)).logits, lm(x).logits[:, 5:])
    i = torch.tensor([2, 0, 0, 1]); close(lm(x[i, :1], cache=trunk.select(i)).logits, lm(torch.cat([x, x[:, :1]], 1)[i]).logits[:, -1:])
    with pytest.raises(ValueError): cache.crop(len(cache) + 1)

def test_gradients_reach_soft_tokens(lm):
    e = lm.embed(ids()).detach().requires_grad_(); lm(embeds=e).logits[:, 4].sum().backward()
    assert e.grad[:, :5].abs().sum() > 0 and e.grad[:, 5:].abs().max() == 0 # causal, in the gradient too

def test_gradients_through_the_cache():
    lm = build('rotary'); x = ids(); e = lm.embed(x).detach().requires_grad_()
    (whole,) = torch.autograd.grad(lm(embeds=e).logits[:, -1].square().sum(), e)
    o = lm(embeds=e[:, :7], use_cache=True)
    (cut,) = torch.autograd.grad(lm(embeds=e[:, 7:], cache=o.cache).logits[:, -1].square().sum(), e)
    close(cut, whole)

@pytest.mark.parametrize('name', ['GPT2', 'Llama', 'Qwen3', 'GPTNeoX'])
def test_greedy_is_transformers_greedy(name):
    m = family(name); x = ids(); keep = torch.ones_like(x); keep[0, :5] = 0; keep[1, :2] = 0
    want = m.generate(x, attention_mask=keep, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(m, x, 10, temperature=0, mask=keep), want)

@some
@given(st.integers(0, 10**6), st.integers(1, 45), st.floats(.05, 1.), st.floats(.2, 3.))
def test_filter_is_transformers_filter(seed, k, p, temperature):
    from transformers.generation import logits_process as lp
    z = torch.randn(4, V, generator=torch.Generator().manual_seed(seed))
    want = z
    for w in (lp.TemperatureLogitsWarper(temperature), lp.TopKLogitsWarper(min(k, V)), lp.TopPLogitsWarper(p)): want = w(None, want)
    got = filter_logits(z, temperature=temperature, top_k=k, top_p=p)
    assert (got.softmax(-1) - want.softmax(-1)).abs().max() < 1e-5

@pytest.mark.parametrize('p', [.3, .9])
def test_generation_uses_only_its_generator(p):
    lm = build('learned'); g = lambda: torch.Generator().manual_seed(3)
    a = generate(lm, ids(), 8, top_p=p, generator=g()); state = torch.get_rng_state(); b = generate(lm, ids(), 8, top_p=p, generator=g())
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())

def test_stop():
    lm = build('learned'); free = generate(lm, ids(), 10, temperature=0); stop = free[0, T + 2].item()
    got = generate(lm, ids(), 10, temperature=0, stop=stop)
    for f, g in zip(free[:, T:].tolist(), got[:, T:].tolist()):
        i = f.index(stop) if stop in f else len(f)
        assert g == (f[:i] + [stop]*(len(f) - i))

@some
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 4), st.sampled_from(list(GPTS)))
def test_gpt_any_cut_any_padding(seed, cuts, pad, name):
    lm, t = build(name), sum(cuts); x = ids(2, t + pad, seed); mask = torch.ones_like(x); mask[0, :pad] = 0
    with torch.no_grad():
        cache, out, at = None, [], 0
        for n in [pad + cuts[0], *cuts[1:]]: o = lm(x[:, at:at+n], mask=mask[:, at:at+n], cache=cache, use_cache=True); cache = o.cache; out.append(o.logits); at += n
        out = torch.cat(out, 1)
        close(out[:1, pad:], lm(x[:1, pad:]).logits); close(out[1:], lm(x[1:]).logits)

def test_gpt2_weights_copied():
    m = family('GPT2'); lm = load_gpt2(GPT(V, 32, 2, 4, 64).eval(), m); x = ids(); keep = torch.ones_like(x); keep[0, :5] = 0
    with torch.no_grad(): close(lm(x).logits, m(x).logits); close(lm(x, mask=keep).logits[0, 5:], m(x[:1, 5:]).logits[0])

def test_a_failed_call_leaves_the_cache_alone():
    lm = GPT(V, 32, 2, 4, max_len=8).eval(); o = lm(ids(2, 6), mask=torch.ones(2, 6).long().index_fill(1, torch.tensor([0]), 0), use_cache=True)
    with pytest.raises(ValueError): lm(ids(2, 3), cache=o.cache)
    with pytest.raises(ValueError): lm(ids(3, 1), cache=o.cache)
    assert len(o.cache) == 6 and o.cache.mask.shape == (2, 6)
    assert lm(ids(2, 2), cache=o.cache).logits.shape == (2, 2, V)

def test_save_load_and_wrap(tmp_path):
    lm = build('modern'); lm.save_pretrained(tmp_path); assert (tmp_path/'model.safetensors').exists()
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(ids()).logits, lm(ids()).logits)
    assert as_causal_lm(lm) is lm
    family('Llama').save_pretrained(tmp_path/'hf'); other = as_causal_lm(str(tmp_path/'hf')) # by name, here a folder
    close(other(ids()).logits, build('Llama')(ids()).logits)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    lm = build('modern'); want = lm(ids()).logits; o = copy.deepcopy(lm).to(dtype)(ids(), use_cache=True)
    assert o.logits.dtype == dtype; close(o.logits.float(), want, .15 if dtype == torch.bfloat16 else 1e-4)
    with torch.autocast('cpu', torch.bfloat16): close(lm(ids()).logits.float(), want, .15)

def test_compiles_without_a_break():
    lm = build('modern'); got = torch.compile(lambda x: lm(x).logits, backend='eager', fullgraph=True)(ids()); close(got, lm(ids()).logits, 1e-6)

# ---- layers ----
def reference(q, k, v, allow, bias): # float64, one row at a time
    q, k, v = (x.double() for x in (q, k, v)); s = q @ k.mT/q.shape[-1]**.5 + bias.double()
    w = torch.where(allow, s, -torch.inf); w = torch.where(allow.any(-1, keepdim=True), w, 0.).softmax(-1)*allow
    return w @ v

@some
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 5), st.booleans(), st.booleans(), st.integers(2, 4))
def test_attention_is_softmax(seed, t, past, causal, biased, ndim):
    g = torch.Generator().manual_seed(seed); torch.manual_seed(seed); s = t + past
    attn = Attention(16, 2, causal=causal); shape = {2: (2, s), 3: (2, t, s), 4: (2, 2, t, s)}[ndim]
    mask = torch.rand(shape, generator=g) < .6; bias = torch.randn(2, 2, t, s, generator=g)*biased; x = torch.randn(2, s, 16, generator=g)
    cache = None
    if past: cache = KVCache(1)[0]; attn(x[:, :past], cache=cache)
    got = attn(x[:, past:], mask=mask, bias=bias if biased else None, cache=cache)
    q, k, v = (y.view(2, s, 2, 8).transpose(1, 2) for y in attn.qkv(x).chunk(3, -1))
    allow = {2: mask[:, None, None], 3: mask[:, None] if ndim == 3 else None, 4: mask}[ndim].expand(2, 2, t, s)
    if causal: allow = allow & torch.ones(t, s).tril(past).bool()
    want = attn.out(reference(q[:, :, past:], k, v, allow, bias).float().transpose(1, 2).reshape(2, t, 16))
    close(got, want); got.sum().backward(); assert torch.isfinite(attn.qkv.weight.grad).all()

@some
@given(st.integers(0, 10**6), st.integers(1, 20), st.sampled_from([2, 8, 64]))
def test_rotary_is_llamas(seed, t, d):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    g = torch.Generator().manual_seed(seed); q, k = torch.randn(2, 3, 2, t, d, generator=g); pos = torch.randint(0, 500, (3, t), generator=g)
    cos, sin = LlamaRotaryEmbedding(tf.LlamaConfig(hidden_size=2*d, num_attention_heads=2, head_dim=d))(q, pos)
    a, b = apply_rotary_pos_emb(q, k, cos, sin); close(rotary(q, pos), a); close(rotary(k, pos), b)

@some
@given(st.integers(0, 10**6), st.floats(0, 300), st.floats(0, 300), st.floats(0, 300))
def test_rotary_knows_only_distance(seed, m, n, shift):
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(seed))
    at = lambda x, p: rotary(x, torch.tensor([p]))
    assert abs((at(q, m)*at(k, n)).sum() - (at(q, m + shift)*at(k, n + shift)).sum()) < 5e-3

@some
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_patches_round_trip(rows, cols, p, c):
    x = torch.randn(2, c, rows*p, cols*p); y = patchify(x, p)
    assert y.shape == (2, rows*cols, c*p*p) and torch.equal(unpatchify(y, p, rows=rows), x)
    assert torch.equal(y, torch.nn.functional.unfold(x, p, stride=p).mT)

def test_conv_pair_shapes_and_grad():
    for down, side in ((1, 6), (2, 8), (4, 12), (8, 16)):
        e, d = ConvEncoder(1, 5, down, hidden=8, res=2), ConvDecoder(1, 5, down, hidden=8, res=2); x = torch.rand(2, 1, side, side*2 if side % down == 0 else side)
        z = e(x); assert z.shape == (2, 5, side//down, 2*side//down); d(z).sum().backward(); assert all(p.grad is not None for p in e.parameters())

def test_transformer_matches_torch_encoder():
    torch.manual_seed(0); ours = Transformer(16, 2, 4, act='relu').eval(); layer = torch.nn.TransformerEncoderLayer(16, 4, 64, 0., batch_first=True, norm_first=True)
    ref = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(16), enable_nested_tensor=False).eval()
    for a, b in zip(ours.blocks, ref.layers):
        for to, of in ((a.norm1, b.norm1), (a.norm2, b.norm2), (a.attn.out, b.self_attn.out_proj), (a.mlp[0], b.linear1), (a.mlp[2], b.linear2)): to.load_state_dict(of.state_dict())
        a.attn.qkv.weight.data, a.attn.qkv.bias.data = b.self_attn.in_proj_weight.data, b.self_attn.in_proj_bias.data
    x = torch.randn(2, 5, 16); keep = torch.ones(2, 5).long(); keep[0, 3:] = 0
    with torch.no_grad(): close(ours(x), ref(x)); close(ours(x, mask=keep)[1:], ref(x, src_key_padding_mask=keep == 0)[1:]); close(ours(x, mask=keep)[0, :3], ref(x[:1, :3])[0])
