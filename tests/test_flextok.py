"FlexTok against brute force: laws of k, masks, modulation, prefixes, the teacher, saving."
import math
from fractions import Fraction
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from tokbook.codec import Tokens, at_lengths, evaluate_tokenizer, keep_mask
from tokbook.flow import APG, CFG
from tokbook.generator import ARGenerator
from tokbook.image.flextok import *
from tokbook.quantize import FSQ

settings.register_profile('flextok', max_examples=20, deadline=None, derandomize=True); settings.load_profile('flextok')
def gen(seed=0): return torch.Generator().manual_seed(seed)
def rand(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=gen(seed), dtype=dtype)
def awake(m, std=.15, seed=1): # no zeros left of a new model
    with torch.no_grad(): [p.normal_(std=std, generator=gen(seed + i)) for i, p in enumerate(m.parameters()) if p.ndim > 1]
    return m.eval()
def small(decoder='flow', **kw):
    torch.manual_seed(0)
    return awake(FlexTok(8, 1, 4, **dict(registers=5, levels=[5, 4, 3], width=16, heads=2, depth=2, decoder_depth=2, decoder=decoder) | kw))

@given(n=st.integers(1, 70), mode=st.sampled_from(KEEP_MODES))
def test_law_by_enumeration(n, mode):
    stops = [k for k in range(1, n + 1) if k == n or k & (k - 1) == 0]
    up = lambda k: min(s for s in stops if s >= k)
    p = [Fraction(0)]*(n + 1)
    if mode == 'uniform_pow2':
        for k in range(1, n + 1): p[up(k)] += Fraction(1, n)
    else:
        for k in (range(1, n + 1) if mode == 'uniform' else stops): p[k] += Fraction(1, n if mode == 'uniform' else len(stops))
    torch.testing.assert_close(keep_k_pmf(n, mode), torch.tensor([float(q) for q in p[1:]], dtype=torch.float64), atol=1e-12, rtol=0)
    k = sample_keep_k(4000, n, gen(n), mode=mode)
    assert k.dtype == torch.int64 and k.min() >= 1 and k.max() <= n
    assert (torch.bincount(k, minlength=n + 1)[1:]/4000 - keep_k_pmf(n, mode)).abs().max() < 5*.5/4000**.5
    assert k.equal(sample_keep_k(4000, n, gen(n), mode=mode))

def test_fsq_is_the_public_one():
    other = pytest.importorskip('vector_quantize_pytorch').FSQ([8, 8, 8, 5, 5, 5]); ours = FSQ([8, 8, 8, 5, 5, 5])
    u = 2*rand(1, 5000, 6); q, ids = other(u)
    assert ids[0].long().equal(ours.encode(u[0])) # also the order of the index
    torch.testing.assert_close(q[0], ours.decode(ids[0].long()), atol=1e-6, rtol=0)

@given(a=st.integers(1, 6), b=st.integers(1, 6), c=st.integers(0, 4), d=st.integers(1, 8), seed=st.integers(0, 50))
def test_segment_affine(a, b, c, d, seed):
    lengths = tuple(n for n in (a, b, c) if n); s, t = len(lengths), sum(lengths)
    x, k, m = (rand(2, n, d, seed=seed + i, dtype=torch.float64).requires_grad_() for i, n in enumerate((t, s, s)))
    of = torch.repeat_interleave(torch.arange(s), torch.tensor(lengths)); w = rand(2, t, d, seed=9, dtype=torch.float64)
    want, got = x*k[:, of] + m[:, of], segment_affine(x, k, m, lengths)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0); torch.testing.assert_close(segment_affine(x, k, None, lengths), x*k[:, of], atol=1e-12, rtol=0)
    for g, h in zip(torch.autograd.grad((got*w).sum(), (x, k, m)), torch.autograd.grad((want*w).sum(), (x, k, m))): torch.testing.assert_close(g, h, atol=1e-12, rtol=0)

def test_each_segment_has_its_own_modulation():
    block = SegmentBlock(8, 2, 4, (3, 5)); x, c = rand(2, 8, 8), rand(2, 4)
    assert block(x, c).equal(x) # new: the identity
    with torch.no_grad(): block.ada.proj.weight[:6*8].normal_(generator=gen()) # the first segment's six vectors only
    y = block(x, c); assert (y[:, :3] != x[:, :3]).any() and y[:, 3:].equal(x[:, 3:])

@given(k=st.integers(1, 5), n=st.integers(5, 9), patch=st.sampled_from([2, 4, 8]), seed=st.integers(0, 9))
def test_prefix_of_ids(k, n, patch, seed):
    torch.manual_seed(seed); tok = awake(FlexTok(8, 1, patch, registers=n, levels=[5, 4, 3], width=16, heads=2), .3); x = torch.rand(3, 1, 8, 8, generator=gen(seed))
    assert tok.quantizer.encode(tok.encoder(x, k)).equal(tok.encode(x).values[:, :k])
    j = n - 1; u = tok.latent(x); g = torch.autograd.grad(u[:, :j].square().sum(), tok.encoder.registers, retain_graph=True)[0]
    assert (g[j:] == 0).all() and (g[:j] != 0).any()

@pytest.mark.parametrize('decoder', ['flow', 'direct'])
def test_lists_of_all_lengths(decoder):
    tok = small(decoder).double(); x = torch.rand(4, 1, 8, 8, generator=gen()).double(); ids = tok.encode(x).values
    draw = lambda t, s=0: tok.decode(t, **(dict(steps=3, generator=gen(s)) if decoder == 'flow' else {}))
    for k in range(1, 6):
        a, b = draw(ids[:, :k]), draw(Tokens(ids, keep_mask(k, 5, 4)))
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        garbage = ids.clone(); garbage[:, k:] = 7
        assert b.equal(draw(Tokens(garbage, keep_mask(k, 5, 4)))) # what is not kept does not count
    mixed = draw(Tokens(ids, keep_mask(torch.tensor([1, 3, 5, 2]), 5)))
    for i, k in enumerate((1, 3, 5, 2)):
        if decoder == 'direct': torch.testing.assert_close(mixed[i:i + 1], draw(ids[i:i + 1, :k]), atol=1e-12, rtol=0)
    assert not draw(ids[:, :1]).equal(draw(ids))
    if decoder == 'flow': assert draw(ids).equal(draw(ids)) and not draw(ids).equal(draw(ids, 1))
    assert len(at_lengths(tok, x, [1, 5], **(dict(seed=0, steps=2) if decoder == 'flow' else {}))) == 2
    assert evaluate_tokenizer(tok, x, keep=2, **(dict(steps=2) if decoder == 'flow' else {}))['bits'] == pytest.approx(2*math.log2(60))

def test_hidden_tokens_get_no_gradient():
    tok = small().train(); x = torch.rand(6, 1, 8, 8, generator=gen())
    u = tok.encoder(x).detach().requires_grad_(); zq = tok.quantizer(u).z_q; keep = keep_mask(torch.tensor([1, 2, 3, 4, 5, 1]), 5)
    before = zq.clone(); tok.decoder.loss(x, zq, keep, gen()).backward()
    assert zq.equal(before) and (u.grad[~keep] == 0).all() and (u.grad[keep].abs().sum(-1) > 0).all() and tok.decoder.nested.mask_token.grad.abs().sum() > 0

def test_training_is_one_generator():
    for kw in (dict(), dict(drop=.5), dict(keep='pow2')):
        tok = small(**kw).train(); x = torch.rand(16, 1, 8, 8, generator=gen())
        a, b, c = (tok.loss(x, generator=gen(s)) for s in (1, 1, 2))
        torch.manual_seed(5); d = tok.loss(x, generator=gen(1))
        assert a['loss'].item() == b['loss'].item() == d['loss'].item() != c['loss'].item()
    rule = lambda b, n, g: torch.rand(b, n, generator=g) < .5 # a rule may name any tokens
    assert tok.loss(x, length=rule, generator=gen())['loss'].isfinite() and tok.loss(x, length=lambda b, n, g: 3, generator=gen())['loss'].isfinite()

def test_a_point_is_reached_in_one_step(monkeypatch):
    tok = small(); z0 = rand(1, 1, 8, 8)*.2
    monkeypatch.setattr(tok.decoder, 'velocity', lambda x, t, tokens, hidden=None: (x - z0)/t.view(-1, 1, 1, 1)) # the exact field of a point mass
    for n in (1, 4): torch.testing.assert_close(tok.decoder(torch.zeros(2, 5, 3), steps=n, generator=gen()), ((z0 + 1)/2).expand(2, -1, -1, -1), atol=1e-5, rtol=0)

def test_guidance():
    tok, ids = small(drop=.3), torch.tensor([[1, 2, 3]])
    draw = lambda **kw: tok.decode(ids, steps=3, generator=gen(), **kw)
    torch.testing.assert_close(draw(guidance=CFG(1.)), draw(), atol=1e-5, rtol=0)
    assert not torch.allclose(draw(guidance=APG(4.)), draw(), atol=1e-3)
    tok.decoder.null.data = (tok.decoder.read(tok.quantizer.decode(ids)) - tok.decoder.token_pos)[0].detach() # when "nothing" says the same, guidance changes nothing
    torch.testing.assert_close(draw(guidance=CFG(5.)), draw(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError): small().decode(ids, guidance=CFG(2.))

def test_teacher():
    torch.manual_seed(0); h, x = rand(3, 16, 8), torch.rand(3, 1, 8, 8)
    repa = REPALoss(lambda p: repa.mlp(h).detach(), 8, 6)
    assert repa(h, x).item() == pytest.approx(-1, abs=1e-5) # a teacher that agrees
    grid = REPALoss(lambda p: repa.mlp(h).detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2), 8, 6); grid.mlp = repa.mlp
    assert grid(h, x).item() == pytest.approx(-1, abs=1e-5) # (b, c, h, w) and (b, h*w, c) are read in the same order
    net = nn.Conv2d(1, 6, 4, 4); tok = small().train(); tok.repa = REPALoss(net, 16, 6, block=0, weight=2.)
    out = tok.loss(x, generator=gen()); out['loss'].backward()
    assert all(p.grad is None for p in net.parameters()) and not any('teacher' in n for n, _ in tok.named_parameters())
    tok.repa.weight = 0.; assert tok.loss(x, generator=gen())['loss'].item() == pytest.approx((out['loss'] - 2*out['repa']).item(), abs=1e-5)

def test_frozen_codec_and_saving(tmp_path):
    x = torch.rand(40, 3, 16, 16, generator=gen()); every = PatchPCA(x, 4, 48)
    torch.testing.assert_close(every.decode(every.encode(x)), x, atol=1e-4, rtol=0) # all directions: nothing is lost
    assert every.encode(x).shape == (40, 48, 4, 4) and ((every.encode(x)*2 - 1).var() - 1).abs() < .05
    tok = awake(FlexTok(16, 3, 2, registers=4, levels=[5, 4], width=16, heads=2, vae=PatchPCA(x, 4, 6)))
    tok.save_pretrained(tmp_path); again = FlexTok.from_pretrained(tmp_path, vae=tok.vae)
    assert again.encode(x[:4]).values.equal(tok.encode(x[:4]).values)
    assert again.decode(tok.encode(x[:4], 2), steps=2, generator=gen()).equal(tok.decode(tok.encode(x[:4], 2), steps=2, generator=gen()))
    assert tok.loss(x[:4], generator=gen())['loss'].isfinite() and tok.decode(tok.encode(x[:2]), steps=1).shape == (2, 3, 16, 16)
    for bad in (lambda: tok.encode(x[:, :, :8, :8]), lambda: PatchPCA(x, 4, 0), lambda: FlexTok(12, 3, 2, vae=tok.vae)):
        with pytest.raises(ValueError): bad()

def test_one_generator_every_length():
    tok = small(); lm = awake(ARGenerator(60, 5, classes=3, dim=16, heads=2)); y = torch.tensor([0, 1, 2, 2])
    ids = [generate_prefix(lm, tok, y, k, generator=gen(), steps=1)[1] for k in range(1, 6)]
    for a, b in zip(ids, ids[1:]): assert b[:, :-1].equal(a)
    pics, free = generate_prefix(lm, tok, k=3, batch=2, generator=gen(), steps=1); assert pics.shape == (2, 1, 8, 8) and free.shape == (2, 3)
    assert generate_prefix(lm, small('direct'), y, 2, generator=gen())[0].shape == (4, 1, 8, 8)
    for bad in (lambda: generate_prefix(lm, tok, y, 6), lambda: generate_prefix(ARGenerator(61, 5), tok, k=1)):
        with pytest.raises(ValueError): bad()
