"Clustering, hash and attention of VQToken against brute force, scikit-learn and models of other libraries."
import math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from tokbook.quantize.vqtoken import *
from tokbook.quantize.vqtoken import TOKEN_REDUCTIONS

settings.register_profile('vqtoken', max_examples=25, deadline=None, derandomize=True); settings.load_profile('vqtoken')
gen = lambda seed=0: torch.Generator().manual_seed(seed)
rand = lambda *shape, seed=0: torch.randn(*shape, generator=gen(seed))

# ---- clustering
def slow_lloyd(x, c, iters): # float64, loops over clusters; no cluster may become empty
    u, c = F.normalize(x.double(), dim=-1), F.normalize(c.double(), dim=-1)
    for _ in range(iters):
        labels = (u @ c.T).argmax(1)
        c = torch.stack([F.normalize(u[labels == j].sum(0), dim=0) for j in range(len(c))])
    return (u @ c.T).argmax(1), c, 1 - (u*c[(u @ c.T).argmax(1)]).sum(1).mean()

@given(n=st.integers(12, 60), k=st.integers(1, 6), d=st.integers(2, 12), iters=st.integers(0, 6), seed=st.integers(0, 99))
def test_lloyd_equals_loops(n, k, d, iters, seed):
    x = rand(2, n, d, seed=seed); init = x[:, :k]
    got = spherical_kmeans(x, k, iters=iters, init=init)
    for b in range(2):
        u = F.normalize(x[b].double(), dim=-1); c = F.normalize(init[b].double(), dim=-1); sure = True
        for _ in range(iters + 1):
            s = u @ c.T; labels = s.argmax(1); top = s.topk(min(2, k), 1)[0]
            sure &= len(labels.unique()) == k and (k == 1 or bool((top[:, 0] - top[:, 1]).min() > 1e-5))
            if not sure: break
            c = torch.stack([F.normalize(u[labels == j].sum(0), dim=0) for j in range(k)])
        if not sure: continue       # an empty cluster or a near tie: no one answer
        labels, centers, cost = slow_lloyd(x[b], init[b], iters)
        assert got.labels[b].equal(labels); torch.testing.assert_close(got.centers[b].double(), centers, atol=1e-5, rtol=0); assert abs(got.cost[b] - cost) < 1e-5

@given(n=st.integers(20, 80), k=st.integers(1, 12), seed=st.integers(0, 99), dup=st.booleans())
def test_cost_never_rises(n, k, seed, dup):
    x = rand(2, n, 5, seed=seed)
    if dup: x[:, n//3:] = x[:, :1]                        # many equal tokens: clusters become empty
    cost = torch.stack([spherical_kmeans(x, k, iters=i, generator=gen(seed)).cost for i in range(7)])
    assert (cost.diff(dim=0) <= 1e-5).all()
    sweep = sweep_k(x, range(1, k + 1), generator=gen(seed))
    assert (sweep.cost.diff(dim=1) <= 1e-5).all()
    for i, m in enumerate(sweep.ks): assert sweep.labels[:, i].max() < m

def test_agrees_with_sklearn():
    "scikit-learn's Euclidean step on unit vectors, with centers put back on the sphere after each, is the spherical step."
    from sklearn.cluster import KMeans
    x = F.normalize(rand(1, 300, 8, seed=1), dim=-1); c = x[0, :7].numpy()
    for _ in range(5):
        km = KMeans(7, init=c, n_init=1, max_iter=1, algorithm='lloyd').fit(x[0].numpy())
        labels = np.linalg.norm(x[0].numpy()[:, None] - c, axis=-1).argmin(1)
        means = np.stack([x[0].numpy()[labels == j].mean(0) for j in range(7)])
        np.testing.assert_allclose(km.cluster_centers_, means, atol=1e-5)
        c = means/np.linalg.norm(means, axis=1, keepdims=True)
    got = spherical_kmeans(x, 7, iters=5, init=x[:, :7])
    np.testing.assert_allclose(got.centers[0].numpy(), c, atol=1e-4)

def test_one_video_or_many_small_and_large_path():
    "Videos in a batch do not see each other, and the tiled path of small videos agrees with the kernel."
    x = rand(5, 200, 16, seed=2); init = x[:, :9]
    many = spherical_kmeans(x, 9, init=init)
    for b in range(5): assert spherical_kmeans(x[b:b + 1], 9, init=init[b:b + 1]).labels.equal(many.labels[b:b + 1])

def test_half_precision_and_scale():
    x = rand(2, 100, 8, seed=3)*torch.logspace(-6, 4, 100)[None, :, None]
    a, b = spherical_kmeans(x, 5), spherical_kmeans(x*1e30, 5)
    assert a.labels.equal(b.labels)
    h = (rand(2, 100, 8, seed=3)*300).half()             # squares overflow in half precision
    assert spherical_kmeans(h, 5).cost.isfinite().all()

def test_silhouette_is_sklearns():
    from sklearn.metrics import silhouette_score
    for seed in range(4):
        x = rand(1, 120, 6, seed=seed); l = torch.randint(6, (1, 120), generator=gen(seed)); l[l == 4] = 3 # one cluster is empty
        l[0, 0] = 4 if seed % 2 else 3                                                                    # or has one token
        want = silhouette_score(x[0].numpy(), l[0].numpy(), metric='cosine')
        assert abs(cosine_silhouette(x, l, 6).item() - want) < 1e-4
    with pytest.raises(ValueError): cosine_silhouette(x, l[:, 1:], 6)

def test_planted_number():
    axes = torch.linalg.qr(rand(40, 40))[0][:17]
    x = axes[torch.arange(680) % 17][None] + .05*rand(1, 680, 40, seed=1)
    for how in ('elbow', 'silhouette', 'bic'): assert choose_k(x, range(12, 33), how).k.item() == 17
    assert choose_k(x, range(12, 33), 'released').k.item() == 12
    with pytest.raises(ValueError, match='criterion'): choose_k(x, range(12, 33), 'knee')
    with pytest.raises(ValueError): elbow_k(torch.ones(1, 3), range(4))

# ---- hash and attention
@given(t=st.integers(1, 4), h=st.integers(1, 4), w=st.integers(1, 4), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_hash_is_a_partition(t, h, w, k, seed):
    n = t*h*w; labels = torch.randint(-1, k, (2, n), generator=gen(seed)); got = token_hash(labels, (t, h, w), k)
    for b in range(2):
        places = [tuple(p) for c in range(k) for p in got.lookup(b, c).tolist()]
        assert len(places) == len(set(places)) == int((labels[b] >= 0).sum())
        for c in range(k): assert all(got.map[b][tuple(p)] == c for p in got.lookup(b, c).tolist())
    layer = VQAttention(6, (t, h, w), heads=2, hidden=5)
    O = (got.map.flatten(1)[:, None] == torch.arange(k)[:, None]).float()
    torch.testing.assert_close(layer.positions(got), layer.mix(F.gelu(O @ layer.place + layer.bias)), atol=1e-5, rtol=1e-4)

@given(seed=st.integers(0, 99), k=st.integers(2, 7))
def test_names_and_order_do_not_matter(seed, k):
    torch.manual_seed(seed); layer = VQAttention(8, (2, 3, 4), heads=2)
    x = rand(1, 24, 8, seed=seed); labels = torch.cat([torch.arange(k), torch.randint(k, (24 - k,), generator=gen(seed))])[None]
    perm = torch.randperm(k, generator=gen(seed)); run = lambda l: layer(codebook_from_labels(x, l, k)[0], token_hash(l, (2, 3, 4), k))
    torch.testing.assert_close(run(perm[labels])[:, perm], run(labels), atol=1e-5, rtol=1e-4)
    assert first_come_labels(perm[labels], k).equal(first_come_labels(labels, k))
    shuffle = torch.randperm(24, generator=gen(seed + 1))                # tokens in another order, each with its place
    layer2 = VQAttention(8, (2, 3, 4), heads=2); layer2.load_state_dict(layer.state_dict())
    with torch.no_grad(): layer2.place.copy_(layer.place[shuffle])
    y = layer2(codebook_from_labels(x[:, shuffle], labels[:, shuffle], k)[0], token_hash(labels[:, shuffle], (2, 3, 4), k))
    torch.testing.assert_close(y, run(labels), atol=1e-5, rtol=1e-4)

def test_gradients_reach_tokens_and_places():
    x = rand(2, 2, 3, 3, 8).requires_grad_(); r = VQTokenReducer(8, (2, 3, 3), 4); out = r(x)
    out.tokens.square().sum().backward()
    assert x.grad.abs().sum(-1).gt(0).all() and all(p.grad is not None and p.grad.isfinite().all() for p in r.parameters())

def test_reducer_saves_adapts_and_refuses(tmp_path):
    r = VQTokenReducer(8, (2, 4, 4), (2, 9), heads=2).eval(); x = rand(3, 2, 4, 4, 8, seed=5)
    r.save_pretrained(tmp_path); back = VQTokenReducer.from_pretrained(tmp_path).eval()
    a, b = r(x), back(x)
    assert a.tokens.equal(b.tokens) and a.mask.equal(b.mask) and a.tokens.shape == (3, 9, 8)
    assert a.counts.sum(1).eq(32).all() and a.tokens[~a.mask].eq(0).all()
    assert (a.mask.long().diff(dim=1) <= 0).all()                        # what exists comes first
    assert r(x, r.cluster(x)).tokens.equal(a.tokens)
    with pytest.raises(ValueError): VQTokenReducer(8, (2, 4, 4), (9, 2))
    with pytest.raises(ValueError): VQTokenReducer(8, (2, 4, 4), 4)(x[:, :1])
    with pytest.raises(ValueError): VQAttention(8, (2, 4))

def test_released_normalization_makes_nan_where_we_refuse():
    x = rand(1, 20, 8).half(); x[0, 3] = 0
    assert (x/x.norm(dim=-1, keepdim=True)).isnan().any()
    with pytest.raises(ValueError, match='zeros'): spherical_kmeans(x, 3)
    masked = spherical_kmeans(x, 3, mask=(torch.arange(20) != 3)[None])
    assert masked.labels[0, 3] == -1 and masked.counts.sum() == 19

# ---- baselines and other people's models
@pytest.mark.parametrize('name', list(TOKEN_REDUCTIONS))
def test_reductions(name):
    x = rand(2, 50, 6, seed=1)
    for m in (1, 7, 50): assert TOKEN_REDUCTIONS[name](x, m).shape == (2, m, 6)
    if name in ('pool', 'tome', 'pitome'): torch.testing.assert_close(TOKEN_REDUCTIONS[name](x, 1)[:, 0], x.mean(1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError): TOKEN_REDUCTIONS[name](x, 51)

def test_tome_is_match_and_merge():
    from tokbook.kernels import match_and_merge
    x = rand(2, 40, 6, seed=2); got = tome_merge(x, 26); want = match_and_merge(x, 14)
    torch.testing.assert_close(got.sort(1)[0], want.x.sort(1)[0], atol=1e-5, rtol=1e-4)
    assert all(len(g.unique()) == 5 for g in tome_labels(x, 5)) and all(len(g.unique()) == 5 for g in pitome_labels(x, 5))

@given(b=st.integers(1, 3), s=st.integers(1, 6), m=st.integers(1, 4), seed=st.integers(0, 99), pad=st.sampled_from(['left', 'right']))
def test_splice_equals_lists(b, s, m, seed, pad):
    g = gen(seed); text, visual = torch.rand(b, s, 1, generator=g) + 1, torch.rand(b, m, 1, generator=g) + 5
    mask = torch.rand(b, m, generator=g) > .3; spots = torch.rand(b, s, generator=g) > .6; spots[:, seed % s] = True
    out, keep = splice_visual_tokens(text, visual, mask, spots, pad=pad)
    for i in range(b):
        want, seen = [], False
        for j in range(s):
            if not spots[i, j]: want.append(text[i, j, 0].item())
            elif not seen: want += visual[i][mask[i]][:, 0].tolist(); seen = True
        assert out[i][keep[i]][:, 0].tolist() == want
        assert keep[i].tolist() == ([True]*len(want) + [False]*(keep.shape[1] - len(want)))[::1 if pad == 'right' else -1]

def test_timm_and_qwen_with_random_weights():
    timm, tr = pytest.importorskip('timm', reason='timm is not installed'), pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0); vit = timm.create_model('vit_tiny_patch16_224', pretrained=False, img_size=64, num_classes=0, depth=2).eval()
    lm = tr.Qwen2ForCausalLM(tr.Qwen2Config(vocab_size=50, hidden_size=vit.embed_dim, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)).eval()
    video = torch.rand(2, 3, 3, 64, 64, generator=gen()); r = VQTokenReducer(vit.embed_dim, (3, 4, 4), (2, 8), criterion='bic')
    with torch.no_grad():
        f = vit.forward_features(video.flatten(0, 1))[:, vit.num_prefix_tokens:].view(2, 3, 4, 4, -1); out = r(f)
        ids = torch.tensor([[1, 2, 9, 9, 3]]*2)
        e, keep = splice_visual_tokens(lm.get_input_embeddings()(ids), out.tokens, out.mask, ids == 9)
        logits = lm(inputs_embeds=e, attention_mask=keep.long()).logits
        alone = lm(inputs_embeds=e[:1, :int(keep[0].sum())]).logits                       # padding changes nothing
    assert keep.sum(1).tolist() == (3 + out.mask.sum(1)).tolist() and e.shape[1] == 3 + out.mask.sum(1).max()
    torch.testing.assert_close(logits[:1, :alone.shape[1]], alone, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match='placeholder'): splice_visual_tokens(lm.get_input_embeddings()(ids), out.tokens, out.mask, ids == 40)

def test_compiles():
    layer = VQAttention(8, (2, 3, 3)); h = token_hash(torch.randint(4, (2, 18), generator=gen()), (2, 3, 3), 4); c = rand(2, 4, 8)
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager')(c, h), layer(c, h))

def test_tokdense_table():
    assert abs(tokdense(57.46, 32) - 1.796) < 1e-3 and abs(tokdense(57.72, 13.08) - 4.413) < 1e-3
    assert tokdense(20, 1) > tokdense(57.03, 12)         # guessing among five is denser than any row
    assert tokdense(20, 1, chance=20) == 0
    with pytest.raises(ValueError): tokdense(50, 0)
