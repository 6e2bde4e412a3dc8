"Finite discrete tokens against other solvers, dense products in float64, two processes, and models of transformers."
import math, socket, traceback
from datetime import timedelta
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from tokbook.quantize.fdt import *
from tokbook.quantize.fdt import FDT_ACTIVATIONS, FDT_POOLS, _DENSE

settings.register_profile('fdt', max_examples=30, deadline=None, derandomize=True); settings.load_profile('fdt')
def gen(seed=0): return torch.Generator().manual_seed(seed)
def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=gen(seed), dtype=dtype)

def by_sort(r): # the textbook's way, in float64
    z = r.double() - r.double().amax(-1, keepdim=True); s = z.sort(-1, descending=True)[0]; c = s.cumsum(-1); k = torch.arange(1, s.shape[-1] + 1)
    n = (1 + k*s > c).sum(-1, keepdim=True)
    return (z - (c.gather(-1, n - 1) - 1)/n).clamp_min(0)

# ---- sparsemax
@given(st.integers(1, 300), st.integers(0, 10**6), st.floats(1e-3, 1e3), st.booleans())
def test_sparsemax_is_the_projection(k, seed, spread, ties):
    r = spread*rand(4, k, seed=seed); r = (r/spread).round()*spread if ties else r
    p = sparsemax(r)
    torch.testing.assert_close(p, by_sort(r), rtol=0, atol=1e-12)
    assert (p >= 0).all(); torch.testing.assert_close(p.sum(-1), torch.ones(4).double(), rtol=0, atol=1e-12)
    theta = (torch.where(p > 0, r, 0).sum(-1) - 1)/(p > 0).sum(-1)                      # the conditions of the minimum: one threshold for all
    torch.testing.assert_close(p, (r - theta[:, None]).clamp_min(0), rtol=0, atol=1e-9*max(1, spread))

@given(st.integers(2, 60), st.integers(0, 10**6), st.floats(.1, 10))
def test_sparsemax_gradient_is_the_closed_form(k, seed, spread):
    r = (spread*rand(3, k, seed=seed)).requires_grad_(); up = rand(3, k, seed=seed + 1); p = sparsemax(r)
    g, = torch.autograd.grad(p, r, up); on = p > 0; mean = (up*on).sum(-1, keepdim=True)/on.sum(-1, keepdim=True)
    torch.testing.assert_close(g, on*(up - mean), rtol=0, atol=1e-14)

def test_sparsemax_limits_and_dtypes():
    r = rand(5, 40)
    assert torch.equal(sparsemax(r/1e-6), F.one_hot(r.argmax(-1), 40).double())
    torch.testing.assert_close(sparsemax(r*1e-6), torch.full_like(r, 1/40), rtol=0, atol=1e-5)
    for big in (1e4, 1e30, 3e38): assert torch.equal(sparsemax(torch.full((2, 8), big)), torch.full((2, 8), 1/8))
    low = r.masked_fill(torch.arange(40) % 3 == 0, -math.inf); keep = low[0].isfinite(); p = sparsemax(low)
    assert (p[:, ~keep] == 0).all(); torch.testing.assert_close(p[:, keep], sparsemax(low[:, keep]), rtol=0, atol=1e-15)
    x = low.clone().requires_grad_(); (sparsemax(x)*r).sum().backward(); assert x.grad.isfinite().all()
    for dt, tol in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-6)):
        p = sparsemax(r.to(dt)); assert p.dtype == dt; torch.testing.assert_close(p.double(), by_sort(r.to(dt)), rtol=0, atol=tol)
    wide = (.27/1000*torch.randn(2, 16384, generator=gen())); torch.testing.assert_close(sparsemax(wide).double(), by_sort(wide), rtol=0, atol=1e-8)
    assert torch.equal(sparsemax(wide).sum(-1).sub(1).abs() < 1e-5, torch.tensor([True, True]))
    with pytest.raises(TypeError): sparsemax(torch.ones(3).long())

@given(st.integers(1, 200), st.integers(0, 10**6), st.floats(1e-3, 100))
def test_entmax_meets_its_conditions(k, seed, spread):
    r = spread*rand(3, k, seed=seed); p = entmax15(r); on = p > 0
    torch.testing.assert_close(p.sum(-1), torch.ones(3).double(), rtol=0, atol=1e-10)
    theta = torch.where(on, r/2 - p.sqrt(), -math.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(p, (r/2 - theta).clamp_min(0).square(), rtol=0, atol=1e-8)

def test_entmax_gradient_in_half_precision_keeps_its_dtype():
    r = rand(3, 9).float().bfloat16().requires_grad_(); entmax15(r).square().sum().backward(); assert r.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match='finite maximum'): entmax15(r*math.nan)

# ---- scores
def dense(q, C, tau, mask=None):
    z = torch.einsum('bnd,kd->bnk', q, C)/(tau*q.shape[-1]**.5)
    return (z if mask is None else z.masked_fill(~mask[..., None], -math.inf)).max(1)

@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_scores_equal_the_dense_product(b, n, k, d, seed, masked):
    q, C = rand(b, n, d, seed=seed).requires_grad_(), rand(k, d, seed=seed + 1).requires_grad_()
    mask = torch.rand(b, n, generator=gen(seed)) < .6 if masked else None
    if masked: mask[:, seed % n] = True
    (r, at), (r2, at2) = fdt_scores(q, C, .7, mask), dense(q, C, .7, mask)
    torch.testing.assert_close(r, r2, rtol=0, atol=1e-12); assert torch.equal(at, at2)
    up = rand(b, k, seed=seed + 2)
    for a, e in zip(torch.autograd.grad((sparsemax(r)*up).sum(), (q, C)), torch.autograd.grad((sparsemax(r2)*up).sum(), (q, C))): torch.testing.assert_close(a, e, rtol=0, atol=1e-11)

def test_large_scores_take_the_fused_path_and_agree():
    b, n, k, d = 3, 33, 12_000, 8; assert b*n*k > _DENSE
    q, C, mask = rand(b, n, d).requires_grad_(), rand(k, d, seed=1).requires_grad_(), torch.rand(b, n, generator=gen()) < .5
    (r, at), (r2, at2) = fdt_scores(q, C, 5., mask), dense(q, C, 5., mask)
    torch.testing.assert_close(r, r2, rtol=0, atol=1e-12); assert torch.equal(at, at2)
    for a, e in zip(torch.autograd.grad(sparsemax(r)@C, (q, C), rand(b, d, seed=2)), torch.autograd.grad(sparsemax(r2)@C, (q, C), rand(b, d, seed=2))): torch.testing.assert_close(a, e, rtol=0, atol=1e-11)

def test_released_pads_are_the_released_code():
    "Scores of pads multiplied by zero, then the maximum."
    q, C, mask = rand(6, 5, 4), rand(20, 4, seed=1), torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [5]])
    want = (torch.einsum('bnd,kd->bnk', q, C)/2/3.*mask[..., None]).max(1)
    r, at = fdt_scores(q, C, 3., mask, pads='zero')
    torch.testing.assert_close(r, want[0], rtol=0, atol=1e-12); assert torch.equal(at, want[1])
    assert (fdt_scores(q, C, 3., mask)[0] < 0).any() and (r[:4] >= 0).all()
    with pytest.raises(ValueError, match='pads'): fdt_scores(q, C, 3., mask, pads='both')

def test_scores_under_autocast_and_ties():
    q, C = rand(2, 3, 8, dtype=torch.float32).requires_grad_(), rand(9, 8, seed=1, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16): r, _ = fdt_scores(q, C, 1.); w = sparsemax(r)
    assert r.dtype == w.dtype == torch.float32; torch.testing.assert_close(r, dense(q, C, 1.)[0], rtol=0, atol=.05)
    w[:, 0].sum().backward(); assert q.grad.dtype == torch.float32
    assert torch.equal(fdt_scores(torch.ones(2, 4, 3), torch.randn(7, 3), 1.)[1], torch.zeros(2, 7).long())

# ---- the head
@pytest.mark.parametrize('activation', FDT_ACTIVATIONS)
@pytest.mark.parametrize('pool', FDT_POOLS)
def test_head(activation, pool, tmp_path):
    torch.manual_seed(0); head = FDTHead(dict(image=6, text=5), 30, 8, 4., activation, pool)
    x, mask = torch.randn(3, 7, 6), torch.arange(7) < torch.tensor([[7], [4], [1]])
    o = head(x, 'image', mask); torch.testing.assert_close(o.weights.sum(-1), torch.ones(3)); torch.testing.assert_close(o.feature, o.weights@head.tokens)
    wild = torch.where(mask[..., None], x, 50*torch.randn(3, 7, 6)); torch.testing.assert_close(head(wild, 'image', mask).feature, o.feature, rtol=0, atol=1e-5)
    o.feature.square().sum().backward(); assert all(p.grad.isfinite().all() for p in head.query['image'].parameters()) and head.tokens.grad.any()
    head.save_pretrained(tmp_path); again = FDTHead.from_pretrained(tmp_path)
    assert (again.activation, again.pool, again.tau) == (activation, pool, 4.) and torch.equal(again(x, 'image', mask).feature, o.feature)
    with pytest.raises(ValueError, match='no real position'): head(x, 'image', mask & False)
    with pytest.raises(ValueError, match='modality'): head(x, 'sound')
    with pytest.raises(ValueError, match='x must have shape'): head(x, 'text')
    with pytest.raises(TypeError, match='mask'): head(x, 'image', mask.float())

def test_calibration_hits_every_target():
    q, C = rand(6, 5, 16), rand(300, 16, seed=1)
    for activation in ('sparsemax', 'entmax15'):
        got = [(FDT_ACTIVATIONS[activation](fdt_scores(q, C, calibrate_tau(q, C, t, activation=activation))[0]) > 0).sum(-1).double().mean().item() for t in (2, 20, 150, 290)]
        assert all(abs(g - t) <= 2 for g, t in zip(got, (2, 20, 150, 290))), got
    with pytest.raises(ValueError, match='target'): calibrate_tau(q, C, 1)

# ---- the loss, on two processes
def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def both(seed=0): return rand(7, 4, seed=seed), rand(7, 4, seed=seed + 1), rand(4, 4, seed=seed + 2)

CUTS = (3, 1) # how many of the seven pairs the first process has

def worker(rank, port, queue):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        out = []
        for cut in CUTS:
            v, t, W = both(); W = W.requires_grad_(); part = slice(0, cut) if rank == 0 else slice(cut, 7)
            loss = info_nce(v[part]@W, t[part], 5.); loss.backward(); out.append((loss.item(), W.grad.tolist()))
        queue.put(out)
    except Exception: queue.put(traceback.format_exc())
    finally: dist.destroy_process_group()

@pytest.mark.skipif(not dist.is_available(), reason='torch was built without torch.distributed')
def test_two_processes_are_one_batch():
    ctx = mp.get_context('spawn'); queue, port = ctx.Queue(), free_port()
    ps = [ctx.Process(target=worker, args=(r, port, queue), daemon=True) for r in range(2)]
    for p in ps: p.start()
    got = [queue.get(timeout=240) for _ in ps]
    for p in ps: p.join(60)
    assert all(isinstance(g, list) for g in got), got
    v, t, W = both(); W = W.requires_grad_(); loss = info_nce(v@W, t, 5.); loss.backward()
    for a, b in zip(*got): # one cut each
        assert abs((a[0] + b[0])/2 - loss.item()) < 1e-12
        torch.testing.assert_close((torch.tensor(a[1], dtype=torch.float64) + torch.tensor(b[1], dtype=torch.float64))/2, W.grad, rtol=0, atol=1e-12)

def test_loss_is_clips():
    v, t, _ = both(); a, b = F.normalize(v, dim=-1), F.normalize(t, dim=-1); y = torch.arange(7)
    want = (F.cross_entropy(9*a@b.T, y) + F.cross_entropy(9*b@a.T, y))/2
    torch.testing.assert_close(info_nce(v, t, 9.), want, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match='two pairs'): info_nce(v[:1], t[:1], 9.)

# ---- towers
transformers = pytest.importorskip('transformers', reason='transformers is not installed')
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)

def towers(name):
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipConfig, SiglipModel, ViTConfig, ViTModel
    torch.manual_seed(0)
    if name == 'clip': m = CLIPModel(CLIPConfig(text_config=dict(**SMALL, vocab_size=40, max_position_embeddings=12, eos_token_id=39, bos_token_id=38, pad_token_id=0), vision_config=dict(**SMALL, image_size=32, patch_size=8), projection_dim=16))
    if name == 'siglip': m = SiglipModel(SiglipConfig(text_config=dict(**SMALL, vocab_size=40, max_position_embeddings=12), vision_config=dict(**SMALL, image_size=32, patch_size=8)))
    if name in ('clip', 'siglip'): return m.vision_model, m.text_model
    bert = BertModel(BertConfig(**SMALL, vocab_size=40))
    return (ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)) if name == 'vit' else Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8))), bert

@pytest.mark.parametrize('name,prefix', [('clip', 1), ('siglip', 0), ('vit', 1), ('dino with registers', 5)])
def test_models_of_transformers(name, prefix):
    vision, text = towers(name)
    m = FDTContrastive.from_hf(vision, text, 50, 16, 8., exclude_ids=(38, 39)).eval()
    images, ids = torch.randn(3, 3, 32, 32, generator=gen()), torch.tensor([[38, 5, 6, 39, 0], [38, 7, 39, 0, 0], [38, 8, 9, 10, 39]])
    seen = vision(images).last_hidden_state; assert seen.shape[1] == 16 + prefix
    v, t = m(images, ids, (ids != 0).long())                                            # a mask of integers, as tokenizers make it
    torch.testing.assert_close(v.feature, m.head(seen[:, prefix:], 'image').feature)
    skip = FDTContrastive(vision, text, m.head, image_skip=prefix).eval(); assert torch.equal(skip.ground_image(images).feature, v.feature)
    real = (ids != 0) & (ids < 38); assert real.gather(1, t.at).all()
    longer = F.pad(ids, (0, 3)); torch.testing.assert_close(m.ground_text(longer, longer != 0).feature, t.feature, rtol=0, atol=1e-5)
    m.loss(images, ids, ids != 0)['loss'].backward(); assert any(p.grad is not None and p.grad.any() for p in vision.parameters()) and any(p.grad is not None and p.grad.any() for p in text.parameters())
    with pytest.raises(ValueError, match='no real position'): m.ground_text(torch.tensor([[38, 39, 0]]), torch.tensor([[1, 1, 0]]))

def test_a_fit_lowers_the_loss():
    from tokbook.train import Batches, fit
    torch.manual_seed(0); emb = torch.nn.Embedding(8, 12)
    m = FDTContrastive(lambda x: x.flatten(2).mT, lambda i, attention_mask=None: emb(i), FDTHead(dict(image=8, text=12), 32, 8, 6.), image_skip=0); m.emb = emb
    basis = rand(8, 8, dtype=torch.float32)
    def batch(g, bs):
        ids = torch.rand(bs, 8, generator=g).argsort(1)[:, :2]; return basis[ids].mT[..., None] + .05*torch.randn(bs, 8, 2, 1, generator=g), ids
    watch = FDTMonitor(m.head); h = fit(m, lambda m, b: m.loss(*b), Batches(batch, 32, steps=120), steps=120, lr=1e-2)
    loss = h.losses['loss']; assert sum(loss[-10:])/10 < .6*sum(loss[:5])/5 and 1 < h.losses['image_support'][-1] <= 32
    assert watch.rows['image'] == 120*32 and watch.dead['text'] < 1; watch.remove(); m(*batch(gen(), 4)); assert watch.rows['image'] == 120*32
    x, ids = batch(gen(5), 64); v, t = m(x, ids); own, other = shared_support(v.weights, t.weights); assert own.mean() > other
    with pytest.raises(ValueError): FDTMonitor(m)
