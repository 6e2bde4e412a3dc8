"Token merging against slow references, on every kind of model it claims to know."
import copy, math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from tokbook.efficient.pitome import *
from tokbook.efficient.pitome import METHODS, MODES

settings.register_profile('pitome', max_examples=25, deadline=None, derandomize=True); settings.load_profile('pitome')
OPTIONS = dict(margin=.5, kind='elu', alpha=1., mask=None, n_prefix=0, impl='auto')
def gen(seed=0): return torch.Generator().manual_seed(seed)
def rand(*shape, seed=0): return torch.randn(*shape, generator=gen(seed))
def plan_of(name, x, k, **kw): return METHODS[name][0](x, k=k, generator=gen(1), **{**OPTIONS, **kw})
def partner(p, b=0): return {a: p.dst[b, j].item() for a, j in zip(p.src[b].tolist(), p.dst_of_src[b].tolist())}
def together(p): return p.group[:, :, None] == p.group[:, None]

# ---- the algorithm, by loops in float64
def slow(x, k, margin, kind, alpha, real=None):
    u = F.normalize(x.double(), dim=-1); t = len(x); real = [True]*t if real is None else real.tolist()
    c = [[float(u[i]@u[j]) for j in range(t)] for i in range(t)]
    def f(s):
        if kind == 'gaussian': sg = 1 - margin; return math.exp(-.5*((1 - s)/sg)**2)/(sg*math.sqrt(2*math.pi))
        low = alpha*(math.exp(s - margin) - 1)
        return low if s < margin else s - margin if kind == 'elu' else s
    n = sum(real)
    e = [sum(f(c[i][j]) for j in range(t) if real[j])/n if real[i] else -math.inf for i in range(t)]
    s = sorted(range(t), key=lambda i: -e[i]); a, b = s[:2*k:2], s[1:2*k:2]
    return e, s[2*k:], {i: max(b, key=lambda j: c[i][j]) for i in a}

@given(t=st.integers(4, 24), d=st.integers(2, 12), seed=st.integers(0, 99), kind=st.sampled_from(['elu', 'eq4', 'gaussian']), margin=st.floats(-.9, .9), frac=st.floats(0, .5))
def test_plan_equals_loops(t, d, seed, kind, margin, frac):
    x, k = rand(t, d, seed=seed), int(frac*t)
    e, safe, moves = slow(x, k, margin, kind, .7)
    gaps = sorted(e); near = min((b - a for a, b in zip(gaps, gaps[1:])), default=1)
    torch.testing.assert_close(energy_score(x[None], margin, alpha=.7, kind=kind)[0], torch.tensor(e, dtype=torch.float32), rtol=1e-4, atol=1e-5)
    if near < 1e-5: return # a tie in float32: no order to compare
    p = pitome_plan(x[None], k=k, margin=margin, kind=kind, alpha=.7, n_prefix=0)
    if k: assert p.protect[0].tolist() == safe and partner(p) == moves
    else: assert p.group.equal(torch.arange(t)[None])

def test_elu_is_torchs():
    x = rand(2, 30, 8); c = F.normalize(x, dim=-1)@F.normalize(x, dim=-1).mT
    torch.testing.assert_close(energy_score(x, .3, alpha=.5), F.elu(c - .3, .5).mean(-1), rtol=1e-5, atol=1e-6)

@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), m=st.floats(.05, .95), alpha=st.floats(0, 2))
def test_energy_closed_form(sizes, m, alpha):
    n, N = torch.tensor(sizes), sum(sizes)
    x = torch.eye(8)[torch.repeat_interleave(torch.arange(len(sizes)), n)]
    want = (n*(1 - m) + (N - n)*alpha*(math.exp(-m) - 1))/N
    torch.testing.assert_close(energy_score(x[None], m, alpha=alpha)[0], torch.repeat_interleave(want, n).float(), rtol=1e-4, atol=1e-6)

# ---- what must not matter
@pytest.mark.parametrize('name', ['pitome', 'unprotected', 'inverted'])
def test_order_rotation_and_scale_do_not_matter(name):
    x = rand(1, 40, 16, seed=3); base = together(plan_of(name, x, 12))
    for s in range(20):
        p = torch.randperm(40, generator=gen(s)); q = p.argsort()
        assert together(plan_of(name, x[:, p], 12))[:, q][:, :, q].equal(base)
    turn = torch.linalg.qr(rand(16, 16, seed=5))[0]
    assert together(plan_of(name, x@turn, 12)).equal(base) and together(plan_of(name, x*1e4, 12)).equal(base) and together(plan_of(name, x*1e-4, 12)).equal(base)
    assert together(plan_of(name, x*(.1 + torch.rand(1, 40, 1, generator=gen())), 12)).equal(base) # a cosine knows no length

def test_tome_does_depend_on_the_order():
    x = rand(1, 40, 16, seed=3); p = torch.randperm(40, generator=gen()); q = p.argsort()
    assert not together(plan_of('tome', x[:, p], 12))[:, q][:, :, q].equal(together(plan_of('tome', x, 12)))

def test_ties_are_reproducible():
    x = rand(1, 5, 8).repeat(2, 8, 1)
    for name in METHODS: assert plan_of(name, x, 15).group.equal(plan_of(name, x, 15).group), name
    assert plan_of('pitome', x, 15).group[0].equal(plan_of('pitome', x, 15).group[1]) # equal rows, equal plans
    assert plan_of('pitome', torch.zeros(1, 12, 4), 5).group.shape == (1, 12)

# ---- plans
@given(b=st.integers(1, 3), t=st.integers(2, 30), prefix=st.integers(0, 3), seed=st.integers(0, 99), name=st.sampled_from(sorted(METHODS)), frac=st.floats(0, .5))
def test_plan_is_a_partition_and_conserves(b, t, prefix, seed, name, frac):
    n, k = prefix + t, int(frac*t); x = rand(b, n, 6, seed=seed); s = torch.randint(1, 6, (b, n), generator=gen(seed)).float(); s[:, :prefix] = 1
    p = plan_of(name, x, k, n_prefix=prefix)
    assert p.keep.shape == (b, n - k) and p.group.shape == (b, n)
    assert p.group.gather(1, p.keep).equal(torch.arange(n - k).expand(b, -1))     # every output is built on a token of its own
    assert p.group[:, :prefix].equal(torch.arange(prefix).expand(b, -1)) and (p.group[:, prefix:] >= prefix).all()
    y, z = p.merge(x, s)
    torch.testing.assert_close((y.double()*z[..., None]).sum(1), (x.double()*s[..., None]).sum(1), rtol=1e-5, atol=1e-4)
    assert z.sum(1).equal(s.sum(1)) and y[:, :prefix].equal(x[:, :prefix])
    assert p.unmerge(y).shape == x.shape
    q = plan_of(name, y, (n - k - prefix)//4, n_prefix=prefix); both = p.compose(q); w, v = q.merge(y, z)
    torch.testing.assert_close(both.merge(x, s)[0], w, rtol=1e-4, atol=1e-5); assert both.merge(x, s)[1].equal(v)
    o = both.in_order(); first = [(o.group == i).int().argmax(1) for i in range(o.keep.shape[1])]
    assert all((a < c).all() for a, c in zip(first, first[1:])) and o.unmerge(o.merge(x)).equal(both.unmerge(both.merge(x)))

def test_merge_by_loops():
    x, s = rand(2, 21, 5), torch.randint(1, 9, (2, 21), generator=gen()).float(); p = plan_of('pitome', x, 8)
    y, z = p.merge(x, s)
    for b in range(2):
        for g in range(13):
            i = (p.group[b] == g).nonzero()[:, 0]
            torch.testing.assert_close(y[b, g], (x[b, i]*s[b, i, None]).sum(0)/s[b, i].sum()); assert z[b, g] == s[b, i].sum()
            torch.testing.assert_close(p.merge(x, mode='sum')[b, g], x[b, i].sum(0)); torch.testing.assert_close(p.merge(x, mode='amax')[b, g], x[b, i].amax(0))
            torch.testing.assert_close(p.merge(x, mode='mlerp')[b, g].norm(), x[b, i].norm(dim=-1).max()); torch.testing.assert_close(p.merge(x, mode='prune')[b, g], x[b, p.keep[b, g]])

def test_merge_keeps_dtype_and_passes_gradients():
    x = rand(1, 12, 4); p = plan_of('pitome', x, 4)
    for dt in (torch.float16, torch.bfloat16, torch.float64): assert p.merge(x.to(dt))[0].dtype == dt
    assert p.merge(torch.arange(12)[None], mode='amax').dtype == torch.int64
    v = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: p.merge(v, torch.arange(1., 13, dtype=torch.float64)[None])[0], v)

def test_identical_tokens_survive_the_round_trip():
    x = rand(2, 8, 6).repeat_interleave(2, 1); p = pitome_plan(x, .5, .5, n_prefix=0)
    torch.testing.assert_close(p.unmerge(p.merge(x)), x)

def test_counting_tolerates_floats():
    for T in range(2, 300):
        for pct in range(50, 101): assert n_remove(T, pct/100) == min(T*(100 - pct)//100, T//2), (T, pct)

# ---- ToMe, computed another way
def test_bsm_against_an_independent_tome():
    for seed in range(5):
        x = rand(2, 33, 8, seed=seed); u = F.normalize(x, dim=-1); sim, to = (u[:, ::2]@u[:, 1::2].mT).max(-1); p = bsm_plan(x, k=9, n_prefix=0)
        for b in range(2):
            top = sim[b].topk(9).indices
            assert partner(p, b) == {2*i.item(): 2*to[b, i].item() + 1 for i in top}

# ---- padding
def test_padding_is_neither_counted_nor_merged():
    x = torch.cat([rand(1, 20, 8, seed=2), torch.ones(1, 12, 8)], 1); real = torch.arange(32)[None] < 20
    e, safe, moves = slow(x[0], 6, .5, 'elu', 1., real[0])
    p = pitome_plan(x, k=6, margin=.5, n_prefix=0, mask=real)
    assert partner(p) == moves and set(range(20, 32)) <= set(p.protect[0].tolist())
    assert (pitome_plan(x, k=6, margin=.5, n_prefix=0).src >= 20).any() # the trap: without a mask the pads have the highest energy
    for name in METHODS:
        p = plan_of(name, x, 6, mask=real); m = p.merge(real, mode='amax')
        assert m.sum() == 14 and (p.src < 20).all() and p.merge((~real).float()[..., None], mode='sum').max() == 1, name
    with pytest.raises(ValueError, match='mask'): pitome_plan(x, k=11, n_prefix=0, mask=real)

@pytest.mark.parametrize('bad', [dict(ratio=.49), dict(ratio=1.01), dict(k=17), dict(k=-1), dict(), dict(ratio=.9, k=1), dict(ratio=.9, margin=1.01), dict(ratio=.9, margin=-1.01), dict(ratio=.9, margin=math.nan),
                                 dict(ratio=.9, kind='x'), dict(ratio=.9, split='x'), dict(ratio=.9, protect='x'), dict(ratio=.9, n_prefix=32), dict(ratio=.9, mask=torch.ones(1, 31, dtype=torch.bool))])
def test_plan_refuses(bad):
    with pytest.raises(ValueError): pitome_plan(rand(1, 32, 4), **{**dict(n_prefix=0), **bad})

def test_plan_refuses_tensors():
    for bad in (rand(1, 32, 4).log(), rand(32, 4), torch.zeros(0, 4, 4)):
        with pytest.raises(ValueError): pitome_plan(bad, .9)
    for bad in (torch.ones(1, 32, 4, dtype=torch.long), [[1.]]):
        with pytest.raises(TypeError): pitome_plan(bad, .9)
    p = pitome_plan(rand(1, 32, 4), .9)
    for size in (torch.zeros(1, 32), -torch.ones(1, 32), torch.ones(1, 31), torch.ones(32), torch.full((1, 32), math.nan)):
        with pytest.raises(ValueError): p.merge(rand(1, 32, 4), size)

# ---- proportional attention
@given(h=st.integers(1, 3), d=st.sampled_from([4, 8, 14, 16]), seed=st.integers(0, 50), copies=st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_duplicates_do_not_matter(h, d, seed, copies):
    c = torch.tensor(copies); q, k, v = (rand(2, h, n, d, seed=seed + i) for i, n in enumerate((5, len(c), len(c))))
    many = F.scaled_dot_product_attention(q, k.repeat_interleave(c, 2), v.repeat_interleave(c, 2)); s = c.float().expand(2, -1)
    for impl in ('bias', 'augment'): torch.testing.assert_close(proportional_sdpa(q, k, v, s, impl=impl), many, rtol=1e-4, atol=1e-5)

def test_duplicates_do_not_matter_inside_a_model():
    "The strongest test of log size: merging exact duplicates leaves every other token's output as it was; without it, not."
    timm = pytest.importorskip('timm')
    torch.manual_seed(0); vit = timm.create_model('vit_tiny_patch16_224', depth=3, num_heads=3).eval()
    vit.pos_embed.data.zero_() # so that equal patches are equal tokens, in every block
    patch = torch.randn(1, 3, 7*14, 16, generator=gen()).repeat(1, 1, 1, 14)          # 98 patches, in rows of 14 equal ones ...
    x = torch.zeros(1, 3, 224, 224); x[:, :, :98] = patch; x[:, :, 98:112] = patch[:, :, :14]; x[:, :, 112:] = x[:, :, :112]   # ... 14 rows in 7 kinds
    with torch.no_grad():
        want = vit.forward_features(x)
        for method in ('pitome', 'tome_random'):
            with TokenMerging(vit, method, .8, margin=.99, generator=gen()) as tm: got = vit.forward_features(x)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        with TokenMerging(vit, ratio=.8, margin=.99, prop_attn=False): off = vit.forward_features(x)
    assert tm.tokens[-1] < 120 and (off[:, 0] - want[:, 0]).abs().max() > 1e-3

def test_bfloat16_needs_two_columns():
    q, k, v = (rand(1, 2, 40, 16, seed=i) for i in range(3)); s = torch.randint(1, 400, (1, 40), generator=gen()).float()
    want = proportional_sdpa(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), s.double())
    got = proportional_sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), s, impl='augment').double()
    logs = s.log(); one = (logs.bfloat16().float() - logs).abs().max(); high = logs.bfloat16().float(); two = (high + (logs - high).bfloat16().float() - logs).abs().max()
    assert one > .005 and two < 1e-4 and (got - want).abs().max() < .03

# ---- models
SMALL = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)
VISION, TEXT = dict(image_size=48, patch_size=8, **SMALL), dict(vocab_size=99, max_position_embeddings=64, **SMALL)
HF = dict(ViT='ViT', DeiT='DeiT', CLIPVision='CLIPVision', SiglipVision='SiglipVision', Dinov2='Dinov2', Dinov2WithRegisters='Dinov2WithRegisters', BlipVision='BlipVision', ViTMSN='ViTMSN', IJepa='IJepa', Bert='Bert', Roberta='Roberta',
          Electra='Electra', DistilBert='DistilBert')
TIMM = ['vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'deit3_small_patch16_224', 'vit_base_patch16_clip_224', 'vit_base_patch16_siglip_224', 'vit_mediumd_patch16_reg4_gap_256', 'vit_tiny_r_s16_p8_224']

def hf_model(name, attn=None, **kw):
    T = pytest.importorskip('transformers')
    text = name in ('Bert', 'Roberta', 'Electra', 'DistilBert'); cfg = dict(TEXT if text else VISION)
    if name == 'DistilBert': cfg = dict(vocab_size=99, max_position_embeddings=64, dim=48, n_layers=3, n_heads=3, hidden_dim=96)
    if name == 'Roberta': cfg['pad_token_id'] = 1
    if name == 'Electra': cfg['embedding_size'] = 48
    torch.manual_seed(0); model = getattr(T, name + 'Model')(getattr(T, name + 'Config')(**cfg, **kw, **(dict(attn_implementation=attn) if attn else {}))).eval()
    for p in model.parameters(): p.data += .05*torch.randn(p.shape, generator=gen())
    if not text: return model, dict(pixel_values=rand(2, 3, 48, 48))
    mask = torch.ones(2, 30, dtype=torch.long); mask[1, 22:] = 0
    return model, dict(input_ids=torch.randint(5, 99, (2, 30), generator=gen()), attention_mask=mask)

@pytest.mark.parametrize('name', sorted(HF))
def test_transformers_models(name):
    model, kw = hf_model(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        a = model(**kw)[0]
        with TokenMerging(model, ratio=1.) as tm: torch.testing.assert_close(model(**kw)[0], a, rtol=1e-4, atol=1e-5)
        n = a.shape[1]; assert tm.tokens == [n]*4 and all(s.eq(1).all() for s in tm.sizes)
        with TokenMerging(model, ratio=.8) as tm: b = model(**kw)[0]
        with TokenMerging(model, ratio=.8, unmerge=False) as raw: c = model(**kw)[0]
        with TokenMerging(model, ratio=.8, unmerge=False, keep_order=True) as ordered: d = model(**kw)[0]
        assert b.shape == a.shape and c.shape[1] == tm.tokens[-1] < n and not torch.allclose(a, b, atol=1e-3)
        assert all(s.sum(1).eq(n).all() for s in tm.sizes) and len(tm.plans) == 3
        torch.testing.assert_close(tm.plan.unmerge(c), b); torch.testing.assert_close(ordered.plan.unmerge(d), b)
        torch.testing.assert_close(ordered.plan.unmerge(ordered.sizes[-1]), raw.plan.unmerge(raw.sizes[-1]))
        assert torch.equal(model(**kw)[0], a) and all('forward' not in m.__dict__ for m in model.modules())
    model.train()
    with TokenMerging(model, ratio=.8): model(**kw)[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize('name', ['ViT', 'CLIPVision', 'Bert'])
def test_every_attention_implementation_gives_the_same(name):
    out = {}
    for attn in ('sdpa', 'eager'):
        model, kw = hf_model(name, attn)
        for prop in (True, False):
            with torch.no_grad(), TokenMerging(model, ratio=.7, prop_attn=prop): out[attn, prop] = model(**kw)[0]
    for prop in (True, False): torch.testing.assert_close(out['sdpa', prop], out['eager', prop], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(out['sdpa', True], out['sdpa', False], atol=1e-4) # proportional attention is not silently off

@pytest.mark.parametrize('name', TIMM)
def test_timm_models(name):
    timm = pytest.importorskip('timm'); torch.manual_seed(0)
    model = timm.create_model(name, depth=2).eval(); side = model.pretrained_cfg['input_size'][-1]; x = rand(1, 3, side, side)
    with torch.no_grad():
        a = model(x)
        with TokenMerging(model, ratio=1.): torch.testing.assert_close(model(x), a, rtol=1e-4, atol=1e-5)
        with TokenMerging(model, ratio=.6) as tm: b = model(x)
        assert b.shape == a.shape and tm.n_prefix == model.num_prefix_tokens and tm.tokens[-1] < tm.tokens[0]
        assert torch.equal(model(x), a)

def test_mean_pooling_weighs_by_size():
    timm = pytest.importorskip('timm'); torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', depth=2, global_pool='avg', class_token=False).eval(); x = rand(1, 3, 224, 224)
    with torch.no_grad():
        with TokenMerging(model, ratio=.6): whole = model.pool(model.forward_features(x))
        with TokenMerging(model, ratio=.6, unmerge=False) as tm: few = model.forward_features(x)
    s = tm.sizes[-1][..., None]; torch.testing.assert_close((few*s).sum(1)/s.sum(), whole)

def test_padding_does_not_leak_into_bert():
    "Merging a padded row gives what merging the row alone gives."
    model, kw = hf_model('Bert'); k = 4
    with torch.no_grad():
        with TokenMerging(model, k=k) as tm: both = model(**kw)[0]
        alone = dict(input_ids=kw['input_ids'][1:, :22])
        with TokenMerging(model, k=k) as one: short = model(**alone)[0]
    torch.testing.assert_close(both[1, :22], short[0], rtol=1e-4, atol=1e-4); assert tm.tokens == [30, 26, 22, 18]

def test_text_variant_and_layers():
    model, kw = hf_model('Bert')
    with torch.no_grad(), TokenMerging(model, ratio=.7, kind='gaussian', layers=[0, 1], margin=margin_schedule(3, .9, .65)) as tm: model(**kw)
    assert tm.tokens[2] == tm.tokens[3] < tm.tokens[1] and tm.plans[2] is None and tm.plans[0] is not None

def test_llava_reads_fewer_tokens():
    T = pytest.importorskip('transformers'); torch.manual_seed(0)
    tok = tokens_per_layer(37, 3, .7)[-2] - 1
    cfg = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**VISION), text_config=T.LlamaConfig(num_key_value_heads=3, **TEXT), image_token_id=98, vision_feature_layer=-2)
    model = T.LlavaForConditionalGeneration(cfg).eval(); ids = torch.cat([torch.full((1, tok), 98), torch.randint(5, 90, (1, 6), generator=gen())], 1)
    with pytest.raises(ValueError, match='causal'): TokenMerging(model)
    with torch.no_grad(), TokenMerging(model.model.vision_tower, ratio=.7, unmerge=False): out = model(input_ids=ids, pixel_values=rand(1, 3, 48, 48))
    assert out.logits.shape[1] == tok + 6

def test_refusals():
    T, timm = pytest.importorskip('transformers'), pytest.importorskip('timm')
    for model in (T.GPT2Model(T.GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=99)), T.LlamaModel(T.LlamaConfig(**TEXT)), T.BertModel(T.BertConfig(is_decoder=True, **TEXT))):
        with pytest.raises(ValueError, match='causal'): TokenMerging(model)
    clip = T.CLIPModel(T.CLIPConfig(text_config=T.CLIPTextConfig(**TEXT).to_dict(), vision_config=T.CLIPVisionConfig(**VISION).to_dict(), projection_dim=16)).eval()
    with pytest.raises(ValueError, match='stacks'): TokenMerging(clip)
    with TokenMerging(clip.vision_model, ratio=.8): assert clip.get_image_features(rand(1, 3, 48, 48)) is not None
    ids = torch.randint(5, 99, (1, 12), generator=gen())
    with pytest.raises(ValueError, match='causal'), TokenMerging(clip.text_model, ratio=.8): clip.text_model(input_ids=ids)
    with torch.no_grad(), TokenMerging(clip.text_model, ratio=.8, allow_causal=True) as tm: clip.text_model(input_ids=ids)
    assert tm.tokens[-1] < 12 and all('forward' not in b.__dict__ for b in tm.blocks)
    for name in ('swin_tiny_patch4_window7_224', 'vit_relpos_small_patch16_224', 'resnet18'):
        with pytest.raises(NotImplementedError, match='unknown block'): TokenMerging(timm.create_model(name))
    with pytest.raises(NotImplementedError, match='rope'), TokenMerging(timm.create_model('eva02_tiny_patch14_224', depth=2), ratio=.8) as tm: tm.blocks[0](rand(1, 9, 192), rope=torch.zeros(1))
    with pytest.raises(NotImplementedError, match='unknown block'): TokenMerging(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))

def test_causal_merging_keeps_the_future_out():
    "With allow_causal a merged token sees what its latest part saw: the last token, kept apart, is not changed by what comes after the others."
    T = pytest.importorskip('transformers'); torch.manual_seed(0)
    text = T.CLIPTextModel(T.CLIPTextConfig(**TEXT)).eval(); ids = torch.randint(5, 90, (1, 16), generator=gen())
    with torch.no_grad():
        with TokenMerging(text, ratio=1., allow_causal=True): torch.testing.assert_close(text(input_ids=ids)[0], text(input_ids=ids)[0])
        with TokenMerging(text, ratio=.8, allow_causal=True) as tm: text(input_ids=ids)
    for i, p in enumerate(tm.plans[:1]): # the mask of the merged tokens, against the definition
        pair = tm._in[1]['pair'][0]; n = 16
        for g in range(pair.shape[0]):
            for h in range(pair.shape[0]): assert pair[g, h] == ((p.group[0] == h).nonzero().max() <= (p.group[0] == g).nonzero().max())

def test_a_lookalike_block_is_refused():
    "Same names, other arrangement: believed only if the halves compute what the block computes."
    class Lookalike(nn.Module):
        def __init__(self):
            super().__init__(); self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8); self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
            self.ls1 = self.ls2 = self.drop_path1 = self.drop_path2 = nn.Identity()
        def forward(self, x): return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x)) # parallel
    assert block_anatomy(Lookalike()) is None
    with pytest.raises(NotImplementedError): TokenMerging(nn.Sequential(Lookalike(), Lookalike()))

def test_own_models_and_register_block():
    from tokbook.layers import Transformer
    torch.manual_seed(0); net = Transformer(24, 2, 3).eval(); x = rand(2, 20, 24); mask = torch.arange(20).expand(2, -1) < torch.tensor([[20], [14]])
    with torch.no_grad():
        a = net(x, mask=mask)
        with TokenMerging(net, ratio=1., n_prefix=0): torch.testing.assert_close(net(x, mask=mask), a)
        with TokenMerging(net, ratio=.7, n_prefix=0) as tm: net(x, mask=mask)
    assert tm.tokens == [20, 16, 13]
    with pytest.raises(ValueError, match='causal'): TokenMerging(Transformer(24, 2, 3, causal=True))
    with pytest.raises(TypeError): register_block('mine', 'attn', 1, 2)

def test_exit_restores_after_an_error_and_deterministic():
    timm = pytest.importorskip('timm'); vit = timm.create_model('vit_tiny_patch16_224', depth=2).eval(); x = rand(1, 3, 224, 224)
    with pytest.raises(ZeroDivisionError):
        with TokenMerging(vit): vit(x); 1/0
    assert all('forward' not in b.__dict__ for b in vit.blocks)
    outs = []
    for _ in range(2):
        with torch.no_grad(), TokenMerging(vit, 'tome_random', .8, generator=gen(3)): outs.append(vit(x))
    assert torch.equal(*outs)
    with torch.no_grad(), TokenMerging(vit, ratio=.8) as tm: assert torch.equal(vit(x), vit(x)) # a second pass starts afresh
    assert tm.tokens == [197, 158, 127]
    with pytest.raises(ValueError, match='patched'), TokenMerging(vit): TokenMerging(vit).__enter__()

def test_gradient_checkpointing_recomputes_the_same_merges():
    timm = pytest.importorskip('timm'); torch.manual_seed(0); vit = timm.create_model('vit_tiny_patch16_224', depth=3); x = rand(1, 3, 224, 224); grads = []
    for on in (False, True):
        vit.set_grad_checkpointing(on); vit.zero_grad()
        with TokenMerging(vit, ratio=.8) as tm: vit(x).sum().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad.clone()); assert tm.tokens == [197, 158, 127, 102] and all(tm.plans)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

def test_compiles_without_a_graph_break():
    timm = pytest.importorskip('timm'); torch.manual_seed(0); vit = timm.create_model('vit_tiny_patch16_224', depth=2).eval(); x = rand(1, 3, 224, 224)
    torch._dynamo.reset()
    with torch.no_grad(), TokenMerging(vit, ratio=.8):
        want = vit(x)
        torch.testing.assert_close(torch.compile(vit, backend='aot_eager', fullgraph=True)(x), want, rtol=1e-4, atol=1e-5)

def test_low_precision_and_autocast():
    timm = pytest.importorskip('timm'); torch.manual_seed(0); vit = timm.create_model('vit_tiny_patch16_224', depth=2).eval(); x = rand(1, 3, 224, 224)
    with torch.no_grad():
        with TokenMerging(vit, ratio=.8): want = vit(x)
        with torch.autocast('cpu', torch.bfloat16), TokenMerging(vit, ratio=.8): auto = vit(x)
        low = copy.deepcopy(vit).bfloat16()
        with TokenMerging(low, ratio=.8): half = low(x.bfloat16())
    for y in (auto, half): assert y.dtype == torch.bfloat16 and (y.float() - want).abs().max() < .1

# ---- spectrum
def test_laplacian_against_scipy():
    scipy = pytest.importorskip('scipy.sparse.csgraph'); W = cosine_graph(rand(12, 4))
    torch.testing.assert_close(normalized_laplacian(W), torch.from_numpy(scipy.laplacian(W.numpy(), normed=True)))

@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_spectrum_of_lifted_graphs(sizes, seed):
    g = len(sizes); labels = torch.repeat_interleave(torch.arange(g), torch.tensor(sizes)); labels = labels[torch.randperm(len(labels), generator=gen(seed))]
    Wc = torch.rand(g, g, generator=gen(seed), dtype=torch.float64) + .1; Wc = Wc + Wc.T
    assert spectral_distance(lift(Wc, labels), labels) < 1e-9                                     # block-constant, true partition
    W = cosine_graph(rand(len(labels), 5, seed=seed)); lifted = torch.linalg.eigvalsh(normalized_laplacian(lift(coarsen(W, labels), labels)))
    Ws = coarsen(W, labels, 'sum')
    if (Ws.sum(1) > 1e-9).all() and (W.sum(1) > 1e-9).all():
        lemma = torch.cat([torch.linalg.eigvalsh(normalized_laplacian(Ws)), torch.ones(len(labels) - g, dtype=torch.float64)]).sort().values
        torch.testing.assert_close(lemma, lifted, rtol=0, atol=1e-9)
    assert spectral_distance(W, torch.arange(len(labels))) < 1e-9

def test_costs():
    assert tokens_per_layer(197, 12, 1.) == [197]*13 and tokens_per_layer(65, 6, .5)[-1] == 2
    t = tokens_per_layer(197, 12, .9); assert all(b == a - n_remove(a - 1, .9) for a, b in zip(t, t[1:]))
    assert vit_macs([10, 10], 4) == 12*10*16 + 2*100*4 and vit_macs([10, 5], 4, mlp_after=True) == 4*10*16 + 2*100*4 + 8*5*16
    assert margin_schedule(3) == pytest.approx([.9, .6, .3]) and margin_schedule(3, .9, .65)[0] == .9
