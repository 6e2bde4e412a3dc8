"""Measures against other people's code, over random inputs, and over two processes."""
import os, socket, traceback
from datetime import timedelta
import numpy as np, pytest, scipy.linalg, torch, torch.distributed as dist, torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from skimage import metrics as skm
from tokbook.measure import (FeatureNet, FeatureStats, bits_per_pixel, codec_curve, feature_stats, fit_features, frechet, frechet_distance, psnr, ssim, token_bits)

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)

def draw(seed, *shape, shift=0.): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift

def same(a, b):
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-9); torch.testing.assert_close(a.cov, b.cov, rtol=1e-9, atol=1e-9)

@few
@given(seed=seeds, cuts=st.lists(st.integers(1, 39), max_size=6, unique=True), shift=st.sampled_from([0., 1e3, -1e5]))
def test_streaming_equals_batch(seed, cuts, shift):
    x, s = draw(seed, 40, 3, shift=shift), FeatureStats(3)
    for part in np.split(x.numpy(), sorted(cuts)): s.update(torch.tensor(part))
    assert s.n == 40
    np.testing.assert_allclose(s.mean, x.mean(0), rtol=1e-12, atol=1e-12); np.testing.assert_allclose(s.cov, np.cov(x.T.numpy()), rtol=1e-7, atol=1e-9)

@few
@given(seed=seeds, n=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(lambda n: sum(n) > 1))
def test_merge_is_associative_and_commutative(seed, n):
    def part(i): return FeatureStats(4).update(draw(seed + i, n[i], 4, shift=i)) if n[i] else FeatureStats(4)
    a, b, c = map(part, range(3))
    same((a + b) + c, a + (b + c)); same(a + b + c, c + a + b)
    assert (a.n, b.n, c.n) == tuple(n)                      # the parts are as they were

def test_merge_leaves_its_parts_alone():
    a, b = (FeatureStats(2).update(draw(i, 5, 2)) for i in range(2)); mean, cov = a.mean.clone(), a.cov.clone()
    (a + b).update(draw(3, 5, 2)); a.sync().update(draw(3, 5, 2))
    assert torch.equal(a.mean, mean) and torch.equal(a.cov, cov) and a.n == 5

@few
@given(seed=seeds, d=st.integers(1, 6), ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)), size=st.sampled_from([1e-4, 1., 1e4]))
def test_frechet_is_a_squared_metric(seed, d, ranks, size):
    cov = lambda s, r: (lambda x: size**2*(x @ x.T))(draw(s, d, r))
    a, b, c = ((size*draw(seed + 3*i, d), cov(seed + 3*i + 1, r)) for i, r in enumerate((*ranks, d)))
    ab, ba, bc, ac = frechet_distance(a, b), frechet_distance(b, a), frechet_distance(b, c), frechet_distance(a, c)
    assert ab >= 0 and frechet_distance(a, a) == 0 and ab == pytest.approx(ba, rel=1e-9, abs=1e-12*size**2)
    assert ac**.5 <= ab**.5 + bc**.5 + 1e-6*size              # its root is the Wasserstein distance
    Q = torch.linalg.qr(draw(seed + 99, d, d))[0]; turn = lambda m: (Q @ m[0], Q @ m[1] @ Q.T/2 + (Q @ m[1] @ Q.T).T/2)
    assert frechet_distance(turn(a), turn(b)) == pytest.approx(ab, rel=1e-7, abs=1e-9*size**2)

@few
@given(seed=seeds, d=st.integers(2, 12))
def test_frechet_equals_the_matrix_root(seed, d):
    A, B = (np.cov(draw(seed + i, 3*d + 2, d).numpy().T) for i in range(2))
    m = draw(seed + 2, d)
    want = float(m.square().sum()) + np.trace(A + B - 2*scipy.linalg.sqrtm(A @ B).real)
    assert frechet_distance((m, torch.tensor(A)), (torch.zeros(d), torch.tensor(B))) == pytest.approx(want, rel=1e-6, abs=1e-8)

def test_frechet_of_commuting_gaussians():
    s, t = torch.tensor([1., 2., 0.]), torch.tensor([3., .5, 0.])
    zero = torch.zeros(3)
    assert frechet_distance((zero, s.diag()**2), (zero + 1, t.diag()**2)) == pytest.approx(3 + ((s - t)**2).sum().item(), rel=1e-6)

class Flat(torch.nn.Module):
    "Sixteen block means of each channel: features that torchmetrics can be given."
    num_features = 48
    def forward(self, x): return torch.nn.functional.adaptive_avg_pool2d(x.double()/255, 4).flatten(1)

def test_frechet_equals_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 256, (90, 3, 16, 16), generator=g, dtype=torch.uint8) for _ in range(2)); y = y//2
    fid = FrechetInceptionDistance(Flat(), input_img_size=(3, 16, 16)).set_dtype(torch.float64)
    fid.update(x, real=True); fid.update(y, real=False)
    net = Flat(); got = frechet(x.float(), y.float(), net, batch=32)
    assert got == pytest.approx(fid.compute().item(), rel=1e-4) and got > .1

@few
@given(seed=seeds, c=st.sampled_from([1, 3]), h=st.integers(7, 20), w=st.integers(7, 20), window=st.sampled_from([3, 5, 7]), peak=st.sampled_from([1., 255.]))
def test_psnr_and_ssim_equal_scikit_image(seed, c, h, w, window, peak):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, c, h, w, generator=g); y = peak*(x + .2*torch.rand(x.shape, generator=g) - .1).clamp(0, 1); x = peak*x
    for i, (p, s) in enumerate(zip(psnr(x, y, peak), ssim(x, y, peak, window))):
        a, b = x[i].double().numpy(), y[i].double().numpy()
        assert p.item() == pytest.approx(skm.peak_signal_noise_ratio(a, b, data_range=peak), abs=1e-3)
        assert s.item() == pytest.approx(skm.structural_similarity(a, b, data_range=peak, win_size=window, channel_axis=0, use_sample_covariance=False), abs=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype); y = (x*.5).to(dtype)
    for f in (psnr, ssim):
        want = f(x.double(), y.double()); got = f(x, y)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32); torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert FeatureStats(64).update(x.flatten(1)).mean.dtype == torch.float64

def test_gradients_reach_the_pictures():
    x, y = torch.rand(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)); x.requires_grad_()
    for f in (psnr, ssim):
        g, = torch.autograd.grad(f(x, y).sum(), x); assert g.isfinite().all() and g.abs().sum() > 0

def test_a_frozen_net_still_passes_gradients(tmp_path):
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)); state = torch.get_rng_state()
    net = fit_features(x, torch.arange(20) % 3, steps=3, bs=8, width=8)
    assert torch.equal(torch.get_rng_state(), state)           # the caller's random numbers are left alone
    x.requires_grad_(); g, = torch.autograd.grad(sum(m.square().mean() for m in net.maps(x)), x); assert g.abs().sum() > 0   # a perceptual loss
    pytest.importorskip('huggingface_hub', reason='saving needs huggingface_hub')
    net.save_pretrained(tmp_path); back = FeatureNet.from_pretrained(tmp_path)
    assert torch.equal(back.features(x), net.features(x)) and any(tmp_path.glob('*.safetensors'))

def test_bad_input():
    x = torch.rand(4, 1, 8, 8)
    for bad in (lambda: feature_stats(x, lambda x: x.flatten(1)*float('nan')), lambda: feature_stats(x, lambda x: x.flatten(1)[:1]), lambda: token_bits(1, 0), lambda: bits_per_pixel(1, (8, 0)),
                lambda: codec_curve(x, qualities=[-1]), lambda: codec_curve(-x), lambda: frechet(x, x, lambda x: x.flatten(1))):
        with pytest.raises(ValueError): bad()
    for bad in (lambda: FeatureStats(2).update([[1., 2.]]), lambda: FeatureStats(2) + 1, lambda: frechet_distance(1, 2), lambda: frechet(x, x)):
        with pytest.raises(TypeError): bad()

@pytest.mark.parametrize('format', ['JPEG', 'WEBP'])
@pytest.mark.parametrize('c', [1, 3])
def test_mosaic_finds_its_pictures_again(format, c):
    "Seven flat pictures in a grid of nine: each comes back at its own place."
    x = torch.linspace(.1, .9, 7)[:, None, None, None].expand(7, c, 16, 16)
    p, = codec_curve(x, format, [95]); assert p.mosaic_psnr > 35 and p.psnr > 35 and 0 <= p.payload_bytes < p.file_bytes

# ---- two processes

def parts(x, how): return dict(uneven=[x[:70], x[70:]], interleaved=[x[0::2], x[1::2]], empty=[x, x[:0]])[how]

def child(rank, port, out):
    torch.set_num_threads(1); os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        got = {}
        for how in ('uneven', 'interleaved', 'empty'):
            s, x = FeatureStats(5), parts(draw(0, 100, 5, shift=1e4), how)[rank]
            if len(x): s.update(x)
            t = s.sync(); got[how] = t.n, t.mean.tolist(), t.cov.tolist(), s.n
        got['nobody'] = FeatureStats(5).sync().n
        out.put((rank, got, None))
    except Exception: out.put((rank, None, traceback.format_exc()))
    finally: dist.destroy_process_group()

@pytest.mark.skipif(not dist.is_available(), reason='torch was built without torch.distributed')
def test_sync_over_two_processes():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ctx = mp.get_context('spawn'); out = ctx.Queue()
    ps = [ctx.Process(target=child, args=(r, port, out), daemon=True) for r in range(2)]
    for p in ps: p.start()
    try: got = sorted((out.get(timeout=120) for _ in ps), key=lambda r: r[0])
    finally:
        for p in ps:
            p.join(10)
            if p.is_alive(): p.kill()
    for rank, _, error in got: assert error is None, f'rank {rank}:\n{error}'
    x = draw(0, 100, 5, shift=1e4); a, b = got[0][1], got[1][1]
    assert a['nobody'] == b['nobody'] == 0
    for how in ('uneven', 'interleaved', 'empty'):
        assert a[how][:3] == b[how][:3] and a[how][0] == 100    # the same on both, to the last bit
        assert (a[how][3], b[how][3]) == tuple(map(len, parts(x, how)))   # what each has seen is untouched
        np.testing.assert_allclose(a[how][1], x.mean(0), rtol=1e-13); np.testing.assert_allclose(a[how][2], np.cov(x.T.numpy()), rtol=1e-8, atol=1e-10)
