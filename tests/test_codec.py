"The image tokenizer's skeleton: parts that can be exchanged, losses against closed forms, and what it refuses."
import math
import pytest, torch
from torch import nn
from tokbook.codec import *
from tokbook.flow import CFG
from tokbook.measure import FeatureNet, psnr
from tokbook.quantize import BSQ, FSQ, ResidualVQ, VectorQuantize

SMALL = dict(size=8, channels=1, patch=2, dim=6, width=16, depth=1, heads=2)
x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
QUANTIZERS = {'none': lambda: None, 'FSQ': lambda: FSQ([4, 4], 6), 'VQ': lambda: VectorQuantize(6, 16), 'residual': lambda: ResidualVQ(6, 2, 8, kmeans_init=False), 'bits': lambda: BSQ(12, 6)}


@pytest.mark.parametrize('layout', [None, 5], ids=['grid', 'registers'])
@pytest.mark.parametrize('decoder', ['direct', 'flow'])
@pytest.mark.parametrize('q', QUANTIZERS)
def test_any_part_with_any_other(q, decoder, layout):
    torch.manual_seed(0)
    tok = ImageTokenizer(quantizer=QUANTIZERS[q](), decoder=decoder, latents=layout, **SMALL)
    parts = tok.loss(x, length=uniform_length if layout else None)
    parts['loss'].backward()
    assert all(p.grad is not None for p in tok.encoder.parameters()) and parts['loss'].isfinite()
    tok.eval()
    kw = lambda: dict(steps=2, generator=torch.Generator().manual_seed(3)) if decoder == 'flow' else {}
    t = tok.encode(x); n = layout or 16
    assert t.values.shape[:2] == (6, n) and t.count.tolist() == [n]*6
    y = tok.decode(t, **kw()); assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    torch.testing.assert_close(y, tok.decode(t, **kw()))
    if q != 'none': torch.testing.assert_close(tok.quantizer.decode(t.values), tok.quantizer(tok.latent(x)).z_q.detach())
    assert tok.bits_per_token == (math.inf if q == 'none' else tok.quantizer.bits_per_token) and tok.generative == (decoder == 'flow')
    r = evaluate_tokenizer(tok, x, lambda v: v.flatten(1)[:, :3], **kw())
    assert math.isclose(r['psnr'], psnr(y, x).mean().item(), rel_tol=1e-5) and r['tokens'] == n and math.isclose(r['bpp']*64, r['bits'])


def test_convolutions_make_the_same_grid():
    tok = ImageTokenizer(8, 1, 2, dim=6, width=16, encoder='conv', decoder='conv', quantizer=FSQ([4, 4], 6))
    t = tok.encode(x); assert t.values.shape == (6, 16) and tok.decode(t).shape == x.shape
    one = tok.encode(torch.cat([x[:1], x[:1].roll(2, -1)])).values.view(2, 4, 4)
    assert (one[0, :, 1] == one[1, :, 2]).any() # columns move with the picture, away from its edge
    with pytest.raises(ValueError, match='all tokens'): tok.decode(tok.encode(x, torch.tensor([1, 2, 3, 4, 5, 6])))


@pytest.mark.parametrize('dropped', ['cut', 'token'])
def test_a_mask_is_a_prefix(dropped):
    torch.manual_seed(1)
    tok = ImageTokenizer(latents=5, dropped=dropped, quantizer=FSQ([4, 4], 6), **SMALL).eval()
    ks = torch.tensor([1, 2, 3, 4, 5, 5])
    whole = tok.decode(tok.encode(x, ks))
    for i, k in enumerate(ks.tolist()): torch.testing.assert_close(whole[i], tok.decode(tok.encode(x[i:i+1], k))[0], atol=1e-5, rtol=0)
    for k, y in zip((1, 3, 5), at_lengths(tok, x, (1, 3, 5))): torch.testing.assert_close(y, tok.decode(tok.encode(x, k)))
    assert (tok.decode(tok.encode(x, 1)) - tok.decode(tok.encode(x))).abs().max() > 1e-3


def test_any_subset_may_be_kept():
    torch.manual_seed(2); dec = PatchDecoder(8, 1, 2, 6, 5, width=16).double(); z = torch.randn(4, 5, 6).double()
    keep = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    want = dec(z, keep)
    torch.testing.assert_close(want, dec(torch.where(keep[..., None], z, 7.), keep), atol=1e-12, rtol=0)
    assert (want - dec(torch.where(keep[..., None], 7., z), keep)).abs().amax((1, 2, 3)).min() > 1e-6


def test_a_condition_is_seen_by_all():
    torch.manual_seed(3); enc = PatchEncoder(8, 1, 2, 6, 5, order='prefix', width=16, heads=2).double()
    c = torch.randn(6, 1, 16).double()
    a, b = enc(x.double(), cond=c), enc(x.double(), cond=torch.randn(6, 1, 16).double())
    assert a.shape == (6, 5, 6) and ((a - b).abs().amax(-1) > 1e-6).all()
    torch.testing.assert_close(enc(x.double(), 3, c), a[:, :3])


def test_lengths_are_uniform():
    k = uniform_length(40_000, 4, torch.Generator().manual_seed(0))
    assert (k.bincount(minlength=5)[1:]/40_000 - .25).abs().max() < .01 and k.min() == 1
    with pytest.raises(ValueError): uniform_length(3, 0)
    tok = ImageTokenizer(latents=5, **SMALL)
    a, b, c = (tok.loss(x, length=l)['loss'] for l in (2, lambda b, n, g: 2, lambda b, n, g: torch.full((b,), 2))); torch.testing.assert_close(a, b); torch.testing.assert_close(a, c)


def test_losses_in_closed_form():
    y = torch.rand(6, 1, 8, 8, requires_grad=True)
    assert math.isclose(TokenizerLoss()(y, x)['pixel'].item(), (y - x).square().mean().item(), rel_tol=1e-6)
    assert math.isclose(TokenizerLoss('l1', pixel_weight=2.)(y, x)['pixel'].item(), 2*(y - x).abs().mean().item(), rel_tol=1e-6)
    see = lambda v: v.flatten(1)[:, :4].view(-1, 2, 2, 1)
    p = TokenizerLoss(features=see, perceptual=1.)
    assert p(x, x)['perceptual'] == 0 and p(y, x)['perceptual'] > 0
    a, b = (nn.functional.normalize(see(v), dim=1) for v in (x, y))
    torch.testing.assert_close(p(y, x)['perceptual'], 2*(1 - (a*b).sum(1)).mean()) # a squared distance of unit vectors
    assert p(2*x, x)['perceptual'] < 1e-10 # directions only
    w = torch.tensor([3., 4.], requires_grad=True)
    assert math.isclose(adaptive_weight((w*w).sum()/2, (2*w).sum(), w).item(), 5/8**.5, rel_tol=1e-3)
    assert adaptive_weight((w*w).sum()/2, 0*w.sum(), w, most=9.) == 9
    with pytest.raises(ValueError): adaptive_weight(w.sum(), w.sum(), w, most=-1)


def test_adversary():
    torch.manual_seed(0); adv = Adversary(PatchCritic(1, 8), lr=3e-3)
    real, fake = x, torch.rand(6, 1, 8, 8)*.1
    before = adv.learn(real, fake)
    for _ in range(40): after = adv.learn(real, fake)
    assert after < before/2
    fake = fake.requires_grad_(); adv.fool(fake).backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad is None or p.requires_grad for p in adv.critic.parameters())
    state = [p.clone() for p in adv.critic.parameters()]
    with torch.no_grad(): TokenizerLoss(adversary=adv)(fake, real)
    assert all(torch.equal(a, b) for a, b in zip(state, adv.critic.parameters())) # the critic does not learn from validation
    with pytest.raises(ValueError): Adversary(PatchCritic(1), lr=-1)
    with pytest.raises(ValueError): PatchCritic(0)


def test_all_losses_train_together():
    torch.manual_seed(0); net = FeatureNet(1, 8, 10, 8).eval().requires_grad_(False)
    for decoder in ('direct', 'conv'):
        tok = ImageTokenizer(decoder=decoder, quantizer=VectorQuantize(6, 16), **SMALL)
        obj = TokenizerLoss('smooth_l1', features=net.maps, adversary=Adversary(PatchCritic(1, 8)), adaptive=decoder == 'direct')
        h = fit_tokenizer(tok, x.repeat(4, 1, 1, 1), steps=6, batch=8, objective=obj, progress=False)
        assert {'loss', 'pixel', 'perceptual', 'adversarial', 'quantizer'} <= set(h.losses)
    with pytest.raises(ValueError): TokenizerLoss('huber')
    with pytest.raises(ValueError): TokenizerLoss(perceptual=-1)


def test_same_seed_same_tokenizer():
    def once():
        torch.manual_seed(0); tok = ImageTokenizer(latents=4, decoder='flow', quantizer=FSQ([4, 4], 6), **SMALL)
        fit_tokenizer(tok, x.repeat(4, 1, 1, 1), steps=4, batch=8, length=uniform_length, seed=5, progress=False)
        return tok
    a, b = once(), once()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_guidance_needs_dropped_tokens():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match='drop'): FlowDecoder(8, 1, 2, 6, 4, width=16)(torch.zeros(1, 4, 6), guidance=CFG(2.))
    d = FlowDecoder(8, 1, 2, 6, 4, width=16, drop=.5); nn.init.normal_(d.null)
    y = lambda s: d(torch.ones(2, 4, 6), steps=2, guidance=s and CFG(s), generator=torch.Generator().manual_seed(1))
    for p in d.parameters(): nn.init.normal_(p, std=.2)
    torch.testing.assert_close(y(1.), y(None)); assert (y(3.) - y(1.)).abs().max() > 1e-4
    with pytest.raises(ValueError): FlowDecoder(8, 1, 2, 6, 4, drop=2.)


@pytest.mark.parametrize('q', QUANTIZERS)
def test_saved_with_its_quantizer(q, tmp_path):
    tok = ImageTokenizer(quantizer=QUANTIZERS[q](), latents=4, **SMALL).eval(); tok.save_pretrained(tmp_path)
    new = ImageTokenizer.from_pretrained(tmp_path).eval()
    assert torch.equal(tok.encode(x).values, new.encode(x).values) and type(new.quantizer) is type(tok.quantizer)


def test_only_own_classes_are_built(tmp_path):
    tok = ImageTokenizer(quantizer=FSQ([4, 4], 6), **SMALL); tok.save_pretrained(tmp_path)
    f = tmp_path/'config.json'; f.write_text(f.read_text().replace('tokbook.quantize.vq_survey:FSQ', 'os:system'))
    with pytest.raises(ValueError, match='not a class of tokbook'): ImageTokenizer.from_pretrained(tmp_path)


def test_refusals():
    tok = ImageTokenizer(latents=4, quantizer=FSQ([4, 4], 6), **SMALL)
    for bad in (lambda: tok.encode(x, 0), lambda: tok.encode(x, 5), lambda: tok.encode(x[:, :, :4]), lambda: tok.decode(torch.full((1, 4), 16)), lambda: tok.encode(x*math.nan),
                lambda: at_lengths(tok, x, [9]), lambda: evaluate_tokenizer(tok, x[:, :, :4]), lambda: ImageTokenizer(8, 1, 3), lambda: ImageTokenizer(decoder='conv', latents=3),
                lambda: ImageTokenizer(encoder='vit'), lambda: PatchDecoder(8, 1, 2, 6, dropped='zero'), lambda: FlowDecoder(8, 1, 2, 6, density='cosine'), lambda: keep_mask(torch.tensor([3]), 2),
                lambda: fit_tokenizer(tok, x.repeat(20, 1, 1, 1)*math.nan, steps=1)):
        with pytest.raises(ValueError): bad()
    with pytest.raises(TypeError): tok.decode(torch.zeros(1, 4))
    with pytest.raises(TypeError): tok.encode(x, torch.tensor([1.]*6))


def test_parts_of_ones_own(tmp_path):
    class Mean(nn.Module): # a decoder that draws the first channel everywhere
        def forward(self, z, keep=None): return z[..., :1, :1].mean(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    class Round(nn.Module): # a quantizer without the contract's extras
        dim, codebook_size, bits_per_token = 6, 3, 6*math.log2(3)
        def forward(self, z): return z.tanh().round(), None, z.new_zeros(()), {}
        def encode(self, z): return (z.tanh().round() + 1).long()
        def decode(self, codes, mask=None): return codes.float() - 1
    tok = ImageTokenizer(decoder=Mean(), quantizer=Round(), latents=3, **SMALL)
    assert tok.decode(tok.encode(x)).shape == x.shape and tok.loss(x)['loss'].isfinite()
    tok.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='build it yourself'): ImageTokenizer.from_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path, decoder=Mean(), quantizer=Round())
    torch.testing.assert_close(again.latent(x), tok.latent(x))


class Named(ImageTokenizer):
    "A subclass with an argument of its own, as chapters have them."
    def __init__(self, name: str = 'x', quantizer: nn.Module = None, **kw): super().__init__(quantizer=quantizer, **kw); self.name = name

def test_a_subclass_is_saved_with_its_quantizer(tmp_path):
    tok = Named('y', FSQ([4, 4], 6), latents=3, **SMALL); tok.save_pretrained(tmp_path); new = Named.from_pretrained(tmp_path)
    assert new.name == 'y' and torch.equal(new.encode(x).values, tok.encode(x).values)
