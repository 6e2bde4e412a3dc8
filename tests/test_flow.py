"Rectified flow beyond its notebook: closed forms, invariances on random shapes, dtypes."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.flow import APG, CFG, FlowHead, RectifiedFlow, TimeEmbedding, time_features

G = lambda s=0: torch.Generator().manual_seed(s)
shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000), st.floats(0, 8))
def test_apg_reduces_to_cfg_and_is_orthogonal(shape, seed, scale):
    c, u = torch.randn(2, *shape, generator=G(seed), dtype=torch.float64)
    torch.testing.assert_close(APG(scale, 0., 1., math.inf)(c, u, {}), CFG(scale)(c, u))
    d = (APG(scale)(c, u) - c).flatten(1)
    assert (d*c.flatten(1)).sum(1).abs().max() < 1e-9
    assert (d.norm(dim=1) <= abs(scale - 1)*2.5 + 1e-9).all()
    one = APG(scale)(c[:1], u[:1])  # a sample does not depend on its neighbors
    torch.testing.assert_close(one, APG(scale)(c, u)[:1])


def test_apg_against_three_steps_by_hand():
    vs = torch.randn(3, 2, 4, 5, generator=G(1), dtype=torch.float64); g, run, prev = APG(6., -.5, .25, 1.5), {}, torch.zeros(4, 5)
    for c, u in vs:
        prev = (c - u) - .5*prev
        for i in range(4):
            d = prev[i]*min(1, 1.5/prev[i].norm().item()); unit = c[i]/c[i].norm(); par = (d @ unit)*unit
            if i == 0: want = []
            want.append(c[i] + 5*(d - par + .25*par))
        torch.testing.assert_close(g(c, u, run), torch.stack(want))
    zero = torch.zeros(2, 3)
    assert torch.isfinite(APG(3.)(zero, zero, {})).all() and torch.isfinite(APG(3.)(zero, zero + 1, {})).all()


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_lines(shape, seed):
    f, z, eps = RectifiedFlow(), *torch.randn(2, *shape, generator=G(seed))
    torch.testing.assert_close(f.interpolate(z, eps, torch.zeros(len(z))), z); torch.testing.assert_close(f.interpolate(z, eps, torch.ones(len(z))), eps)
    a, b = torch.full((len(z),), .25), torch.full((len(z),), .75)
    torch.testing.assert_close((f.interpolate(z, eps, b) - f.interpolate(z, eps, a))/.5, f.target(z, eps), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('mean,std', [(0., 1.), (.8, .5), (-1., 2.)])
def test_density_against_scipy(mean, std):
    from scipy import stats
    t = RectifiedFlow('logit_normal', mean, std).sample_t(20_000, G()).double()
    assert stats.kstest(torch.logit(t).numpy(), stats.norm(mean, std).cdf).pvalue > 1e-3
    assert stats.kstest(torch.logit(t).numpy(), stats.norm(mean + .1*std, std).cdf).pvalue < 1e-3  # the test can tell


def test_stratified_times_vary_less():
    spread = lambda f: np.var([f.sample_t(64, G(s)).mean().item() for s in range(100)])
    assert spread(RectifiedFlow(stratified=True)) < .05*spread(RectifiedFlow())
    t = RectifiedFlow('uniform', stratified=True).sample_t(64, G())
    assert not torch.equal(t, t.sort().values) and torch.equal((t.sort().values*64).floor(), torch.arange(64.))


def test_guidance_is_one_call_of_both_branches():
    seen = []
    def model(x, t, y, keep, flag): seen.append((len(x), y.tolist(), keep.tolist(), flag)); return x*y.view(-1, 1)
    x, y, keep = torch.randn(2, 3, generator=G()), torch.tensor([1., 2.]), torch.tensor([5, 6])
    out = RectifiedFlow().sample(model, x, 1, guidance=CFG(3.), null=dict(y=torch.tensor([0.])), y=y, keep=keep, flag='a')
    assert seen == [(4, [1., 2., 0., 0.], [5, 6, 5, 6], 'a')]
    torch.testing.assert_close(out, x - 3*x*y[:, None])
    with pytest.raises(TypeError, match='flag'): RectifiedFlow().sample(model, x, 1, guidance=CFG(3.), null=dict(flag=torch.zeros(1)), y=y, keep=keep, flag='a')
    with pytest.raises(ValueError, match='y must'): RectifiedFlow().sample(model, x, 1, guidance=CFG(3.), null=dict(y=torch.zeros(3)), y=y, keep=keep, flag='a')


def test_momentum_does_not_leak_between_runs():
    g, x, f = APG(4.), torch.randn(3, 4, generator=G()), RectifiedFlow()
    draw = lambda: f.sample(lambda x, t, y: x*y, x, 5, guidance=g, null=dict(y=torch.zeros(1, 1)), y=torch.ones(3, 1))
    first = draw(); assert torch.equal(first, draw())


def test_time_errors_and_dtypes():
    for bad in (torch.tensor([-.1]), torch.tensor([1.01]), torch.tensor([math.nan])):
        with pytest.raises(ValueError): time_features(bad, 8)
        with pytest.raises(ValueError): TimeEmbedding(8)(bad)
    with pytest.raises(TypeError): time_features(torch.tensor([1]), 8)
    assert time_features(torch.rand(3).double(), 8).dtype == torch.float64
    m = TimeEmbedding(8).bfloat16(); assert m(torch.rand(3).bfloat16()).dtype == torch.bfloat16
    h = FlowHead(3, 4).bfloat16(); c = torch.randn(5, 4).bfloat16()
    assert h.sample(c, 2, generator=G()).dtype == torch.bfloat16 and h.loss(torch.randn(5, 3).bfloat16(), c, G()).shape == (5,)


def test_head_learns_a_linear_gaussian():
    "Tokens A c + noise: mean and spread of the samples must be those of the process."
    torch.manual_seed(0); g, A, h = G(), torch.tensor([[.8, 0.], [-.5, .5]]), FlowHead(2, 2, width=32)
    opt = torch.optim.Adam(h.parameters(), 4e-3)
    for _ in range(500):
        c = torch.randn(256, 2, generator=g); z = c @ A.T + .3*torch.randn(256, 2, generator=g)
        loss = h.loss(z, c, g).mean(); opt.zero_grad(); loss.backward(); opt.step()
    c = torch.tensor([[1., -1.]]).expand(2000, 2); s = h.sample(c, 30, generator=g)
    assert (s.mean(0) - A @ c[0]).abs().max() < .12 and (s.std(0) - .3).abs().max() < .1


def test_compiles_whole():
    h = FlowHead(3, 4); a = torch.randn(5, 3), torch.rand(5), torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(h, backend='eager', fullgraph=True)(*a), h(*a))
