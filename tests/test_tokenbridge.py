"TokenBridge: bins against the definition and scipy, heads against enumeration, the backbone's bookkeeping."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from tokbook.flow import FlowHead
from tokbook.quantize import (ChannelARHead, DimensionwiseQuantizer, MaskedARBackbone, ParallelHead, TokenBridge,
                              frequency_order, gaussian_levels, panter_dite_mse)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.floats(.5, 6), st.sampled_from(['gaussian', 'linear']), st.integers(0, 9))
def test_code_is_the_nearest_value(levels, half, scheme, seed):
    q = DimensionwiseQuantizer(3, levels, -half, half, scheme=scheme).double()
    x = 2*torch.randn(50, 3, generator=torch.Generator().manual_seed(seed))
    d = (x[..., None] - q.centers).abs()
    got = q.encode(x)
    assert (d.gather(-1, got[..., None])[..., 0] - d.amin(-1)).max() < 1e-6
    assert torch.equal(q.encode(q.decode(got)), got)


@pytest.mark.parametrize('levels', [2, 5, 64, 700])
def test_levels_are_truncated_means(levels):
    g, b = gaussian_levels(levels)
    want = [stats.truncnorm.mean(lo, hi) for lo, hi in zip(b[:-1].tolist(), b[1:].tolist())]
    np.testing.assert_allclose(g, want, atol=1e-8)
    with pytest.raises(ValueError, match='not empty'): gaussian_levels(2000)


def test_error_follows_panter_and_dite():
    x = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    for levels in (16, 32, 64): # the paper's range, by luck, is the one that theory asks for
        assert abs((DimensionwiseQuantizer(1, levels)(x).z_q - x).square().mean().item()/panter_dite_mse(levels) - 1) < .06


def test_gradient_passes_straight_through():
    q, x = DimensionwiseQuantizer(4, 8), torch.randn(5, 4, requires_grad=True)
    w = torch.randn(5, 4); (q(x).z_q*w).sum().backward()
    torch.testing.assert_close(x.grad, w)


def test_each_channel_gets_its_own_values():
    x = torch.randn(5000, 2)*torch.tensor([1., 10.])
    q = DimensionwiseQuantizer(2, 8, scheme='lloyd').fit_lloyd(x)
    assert 8 < q.centers[1].max()/q.centers[0].max() < 12
    rel = (q(x).z_q - x).square().mean(0)/x.var(0); assert (rel < .045).all() # the best eight values for a normal variable: .0345


@pytest.mark.parametrize('make', [ParallelHead, ChannelARHead])
def test_head_sums_to_one_and_samples_what_it_says(make):
    torch.manual_seed(0); head = make(4, 3, 3, 16).double().eval()
    for p in head.parameters(): torch.nn.init.normal_(p, std=.4)
    every, z = torch.cartesian_prod(*[torch.arange(3)]*3), torch.randn(2, 4).double()
    p = torch.stack([head.log_prob(v.expand(27, -1), every).double().exp() for v in z])
    torch.testing.assert_close(p.sum(1), torch.ones(2, dtype=p.dtype), atol=1e-6, rtol=0)
    for v, want in zip(z, p):
        ids = head.sample(v.expand(15_000, -1), generator=torch.Generator().manual_seed(1))@torch.tensor([9, 3, 1])
        assert stats.chisquare(ids.bincount(minlength=27).numpy(), (want/want.sum()*15_000).numpy()).pvalue > 1e-3
        best = every[want.argmax()] if make is ParallelHead else None
        if best is not None: assert torch.equal(head.sample(v[None], 0.)[0], best)


def test_kept_keys_change_nothing():
    torch.manual_seed(0); head = ChannelARHead(4, 5, 6, 16, 2).double().eval()
    for p in head.parameters(): torch.nn.init.normal_(p, std=.3)
    z = torch.randn(3, 4).double(); codes = head.sample(z, 0.)
    torch.testing.assert_close(head.logits(z, codes).argmax(-1), codes) # greedy steps agree with one pass over all of them


def test_one_channel():
    head = ChannelARHead(4, 1, 6, 16); assert head.sample(torch.randn(3, 4)).shape == (3, 1) and head.loss(torch.randn(3, 4), torch.zeros(3, 1).long()).shape == (3,)


def build(flow=False, classes=3):
    torch.manual_seed(0); bb = MaskedARBackbone(4, 6, classes, dim=16, enc_depth=1, dec_depth=1, heads=2)
    return TokenBridge(bb, FlowHead(4, 16, 16, 1) if flow else ChannelARHead(16, 4, 8, 16, 1), None if flow else DimensionwiseQuantizer(4, 8), torch.tensor([2, 0, 3, 1]))


@pytest.mark.parametrize('flow', [False, True])
def test_generator_trains_and_draws(flow):
    m, x, y = build(flow), torch.randn(5, 6, 4), torch.tensor([0, 1, 2, 0, 1])
    m.loss(x, y).backward(); assert all(p.grad is not None for n, p in m.named_parameters() if 'head.embed' not in n)
    a, b = (m.sample(y, 3, guidance=2., generator=torch.Generator().manual_seed(4)) for _ in '12')
    assert torch.equal(a, b) and a.shape == (5, 6, 4) and a.isfinite().all()
    path = m.sample(y, 6, path=True, generator=torch.Generator().manual_seed(4)); known = ~path[..., 0].isnan()
    assert (known.sum(-1) == torch.arange(1, 7)[:, None]).all()
    for s in range(1, 6): assert torch.equal(path[s][known[s-1]], path[s-1][known[s-1]]) # what is drawn stays
    if not flow: assert m.sample(y, 4, order='confidence').shape == (5, 6, 4)


def test_channels_come_back_in_their_places():
    m = build(); x = torch.randn(2, 6, 4); codes = m.quantizer.encode(x)
    m.head.sample = lambda z, *a, **k: codes.flatten(0, 1)[:, m.order]
    assert torch.equal(m.sample(torch.tensor([0, 1]), 1), m.quantizer.decode(codes))


def test_hidden_share():
    m, seen = build(), []
    m.backbone.forward = lambda x, known, labels: seen.append((~known).sum(1).tolist()) or torch.zeros(*x.shape[:2], 16)
    for i in range(200): torch.manual_seed(i); m.loss(torch.randn(2, 6, 4))
    n = [v for s in seen for v in s]; assert min(n) == 5 and max(n) == 6 and all(len(set(s)) == 1 for s in seen) # .7 of 6, rounded up; one ratio for a batch


def test_neighboring_bins_start_alike():
    torch.manual_seed(0); e = ChannelARHead(4, 3, 64, 32, 1).embed
    near, far = (e[:, 1:] - e[:, :-1]).norm(dim=-1).max(), (e[:, 0] - e[:, -1]).norm(dim=-1).min(); assert 5*near < far


def test_refusals():
    for bad in (lambda: frequency_order(torch.randn(2, 3, 1, 1)), lambda: build().loss(torch.randn(2, 6, 4), ratio=2.), lambda: build().sample(torch.tensor([0]), 0), lambda: build(classes=None).sample(torch.tensor([0]), guidance=-1.),
                lambda: build(True).sample(torch.tensor([0]), order='confidence'), lambda: panter_dite_mse(1), lambda: DimensionwiseQuantizer(2, 8, -math.inf)):
        with pytest.raises(ValueError): bad()
