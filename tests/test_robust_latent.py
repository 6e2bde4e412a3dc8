"Robust latents against brute force, scipy and closed forms."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.codec import Tokens
from tokbook.image.robust_latent import (LatentPerturbation, anneal_ratio, code_neighbors, delta_for_codebook, perturb_tokens, perturbed_fid, rank_agreement)
from tokbook.measure import feature_stats
from tokbook.quantize import BSQ, FSQ, LFQ, ProductQuantize, ResidualVQ, VectorQuantize

rng = lambda s=0: torch.Generator().manual_seed(s)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_neighbors_by_brute_force(k, c, seed, coarse):
    e = torch.randn(k, c, generator=rng(seed)); e = e.round() if coarse else e           # rounded codes tie, and repeat
    delta = 1 + seed % k; got = code_neighbors(e, delta)
    for i in range(k):
        far = sorted(range(k), key=lambda j: (-1 if j == i else float(((e[i].double() - e[j].double())**2).sum()), j))
        d = lambda js: [float((e[i] - e[j]).norm()) for j in js]
        assert got[i, 0] == i and len(set(got[i].tolist())) == delta
        np.testing.assert_allclose(d(got[i].tolist()), d(far[:delta]), atol=1e-5)
        if coarse: assert got[i].tolist() == far[:delta]                                 # exact distances: ties to the lowest index


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_perturbation_touches_what_it_says(b, n, alpha, beta, seed):
    near = code_neighbors(torch.randn(12, 3, generator=rng(1)), 4); idx = torch.randint(12, (b, n), generator=rng(seed)); idx[0, 0] = -1
    new, mask = perturb_tokens(idx, near, alpha, beta, rng(seed)); again, _ = perturb_tokens(idx, near, alpha, beta, rng(seed))
    assert torch.equal(new, again) and torch.equal(new[~mask], idx[~mask]) and new[0, 0] == -1
    assert (new[mask][:, None] == near[idx[mask]]).any(-1).all()
    assert mask.any(1).sum() <= math.ceil(beta*b + 1e-6)


def test_rate_is_binomial():
    near = code_neighbors(torch.randn(50, 4, generator=rng()), 10); idx = torch.randint(50, (400, 50), generator=rng(1))
    from scipy.stats import binomtest
    new, mask = perturb_tokens(idx, near, .6, 1., rng(2))
    assert binomtest(int((new != idx).sum()), idx.numel(), .6*.9).pvalue > 1e-3
    assert binomtest(int(mask.sum()), idx.numel(), .6).pvalue > 1e-3


@pytest.mark.parametrize('make', [lambda: VectorQuantize(8, 64), lambda: VectorQuantize(8, 64, codebook_dim=4, learn='gradient'), lambda: VectorQuantize(8, 64, cosine=True, gradient='rotation'), lambda: FSQ([4, 4, 4], 8)])
@pytest.mark.parametrize('reference', ['code', 'feature'])
def test_plugs_into_quantizers(make, reference):
    if reference == 'feature' and isinstance(make(), FSQ): pytest.skip('FSQ has no features that live among its codes')
    torch.manual_seed(0); plain = make(); torch.manual_seed(0); q = make()
    z = torch.randn(10, 6, 8, generator=rng()).requires_grad_(); w = torch.randn(10, 6, 8, generator=rng(1))
    a = plain(z); ga, = torch.autograd.grad((a.z_q*w).sum(), z)
    handle = LatentPerturbation(1., .5, 8, reference=reference, generator=rng(2)).plug_into(q)
    b = q(z); gb, = torch.autograd.grad((b.z_q*w).sum(), z)
    moved = (a.z_q - b.z_q).abs().amax(-1) > 1e-5
    assert 0 < moved.any(1).sum() <= 5 and torch.equal(a.codes, b.codes) and torch.equal(a.loss, b.loss)
    torch.testing.assert_close(ga, gb)
    dist = (b.z_q[moved].detach()[:, None] - q.decode(torch.arange(64)).detach()).norm(dim=-1).amin(1); assert dist.max() < 1e-4
    handle.remove(); torch.manual_seed(0); q = make(); torch.testing.assert_close(q(z).z_q, a.z_q)
    q.eval(); LatentPerturbation(1., 1., 8).plug_into(q); assert torch.equal(q(z).z_q, q.decode(q.encode(z)))


@pytest.mark.parametrize('q', [ResidualVQ(8, 2, 16), ProductQuantize(8, 2, 16), LFQ(bits=30), BSQ(30)], ids=lambda q: type(q).__name__)
def test_refuses_what_has_no_list_of_codes(q):
    with pytest.raises(ValueError): LatentPerturbation(delta=2).plug_into(q)


def test_masked_positions_stay():
    q = VectorQuantize(8, 32); LatentPerturbation(1., 1., 32).plug_into(q)
    mask = torch.arange(6) < 4; out = q(torch.randn(5, 6, 8), mask.expand(5, -1))
    assert (out.codes[:, 4:] == -1).all() and (out.z_q[:, 4:] == 0).all()


class Lookup: # a tokenizer without a network: pictures are rows of a table
    def __init__(self, table): self.codebook, self.table = torch.arange(float(len(table)))[:, None], table
    def encode(self, x): return torch.cdist(x.flatten(1), self.table.flatten(1)).argmin(1)[:, None]
    def decode(self, codes): return self.table[codes[:, 0]]


def test_pfid_of_a_tokenizer_that_is_a_table():
    table = torch.rand(40, 1, 2, 2, generator=rng()); x = table[torch.randint(40, (300,), generator=rng(1))]; see = lambda v: v.flatten(1)
    plain, wrapped = Lookup(table), Lookup(table); wrapped.encode = lambda v: Tokens(Lookup.encode(wrapped, v))
    a, b = (perturbed_fid(t, x, see, deltas=(2, 5)) for t in (plain, wrapped))
    assert a.rfid < 1e-9 and a.table.shape == (5, 2) and torch.equal(a.table, b.table) and a.mean == a.table.mean().item() > 0
    new = perturb_tokens(plain.encode(x), code_neighbors(plain.codebook, 2), .9, generator=rng())[0]
    from scipy.linalg import sqrtm
    p, q = feature_stats(x, see), feature_stats(plain.decode(new), see)
    want = ((p.mean - q.mean)**2).sum().item() + np.trace((p.cov + q.cov).numpy() - 2*sqrtm((p.cov @ q.cov).numpy()).real)
    np.testing.assert_allclose(a.table[0, 0].item(), want, atol=1e-6)
    with pytest.raises(ValueError): perturbed_fid(plain, x[:4], see, deltas=(2,))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2)), min_size=3, max_size=9))
def test_rank_agreement_by_scipy(rows):
    from scipy.stats import kendalltau, spearmanr
    m, t, g = zip(*rows)
    if len(set(m)) < 2 or len(set(t)) < 2: return
    r = rank_agreement(m, t, g)
    np.testing.assert_allclose([r.spearman, r.kendall], [spearmanr(m, t).statistic, kendalltau(m, t).statistic], atol=1e-12)
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i] if a[2] == b[2]]
    assert r.pairs == len(pairs) and r.concordant == sum((a[0] - b[0])*(a[1] - b[1]) > 0 for a, b in pairs)


def test_schedule_and_strengths():
    assert [anneal_ratio(e, 40, 120) for e in (0, 40, 80, 120, 200)] == [1., 1., .75, .5, .5]
    assert delta_for_codebook(16384) == (200, 280, 360) and delta_for_codebook(1024) == (10, 15, 20)
    with pytest.raises(ValueError): delta_for_codebook(0)
    with pytest.raises(ValueError): delta_for_codebook(100)
