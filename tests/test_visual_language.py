"The toolkit against brute force, independent libraries and known sources."
import math
from collections import Counter
from functools import lru_cache
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.quantize.visual_language import *

gen = lambda s: torch.Generator().manual_seed(s)
counts_ = st.lists(st.integers(1, 60), min_size=2, max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 300), st.sampled_from(['right', 'down']))
def test_ngrams_are_counted(seed, n, V, along):
    x = torch.randint(V, (2, 5, 6), generator=gen(seed)); rows = (x if along == 'right' else x.mT).reshape(-1, 6 if along == 'right' else 5).tolist()
    want = Counter(tuple(r[i:i + n]) for r in rows for i in range(len(r) - n + 1))
    keys, c = ngram_counts(x, n, along)
    assert dict(zip(map(tuple, keys.tolist()), c.tolist())) == want


@settings(max_examples=40, deadline=None)
@given(counts_)
def test_huffman_is_a_code_and_near_the_entropy(c):
    L = huffman_lengths(torch.tensor(c)); h = entropy_estimate(c, 'plugin'); mean = float((L*torch.tensor(c)).sum())/sum(c)
    assert abs((.5**L.double()).sum().item() - 1) < 1e-12 and h - 1e-9 <= mean < h + 1


@settings(max_examples=25, deadline=None)
@given(counts_, st.sampled_from(ZIPF_LAWS))
def test_no_neighbor_is_likelier(c, kind):
    f = fit_zipf(c, kind); from_lib = np.sort(c)[::-1]; r = np.arange(1, len(c) + 1.)
    assert abs(np.exp(f.log_pmf).sum() - 1) < 1e-9 and math.isclose(f.loglik, from_lib@f.log_pmf, rel_tol=1e-9)
    if kind == 'zipf':
        for s in np.linspace(0, 6, 121): assert from_lib@(-s*np.log(r) - np.log((r**-s).sum())) <= f.loglik + 1e-6
    else: assert f.loglik >= (fit_zipf(c).loglik if kind != 'exponential' else -sum(c)*math.log(len(c))) - 1e-9*sum(c) # what it contains cannot beat it


@settings(max_examples=25, deadline=None)
@given(counts_, st.integers(0, 99))
def test_rarefaction_against_scipy(c, s):
    from scipy.stats import hypergeom
    n = 1 + s % sum(c); want = sum(1 - hypergeom.pmf(0, sum(c), k, n) for k in c)
    assert abs(rarefaction(c, torch.tensor([n])).item() - want) < 1e-6


def test_yule_simon_against_scipy():
    from scipy.stats import yulesimon
    k = torch.arange(1, 60)
    for rho in (.4, 1.1, 3.): np.testing.assert_allclose(yule_simon_pmf(k, rho), yulesimon.pmf(k.numpy(), rho), rtol=1e-9)
    got = [fit_yule_simon(yulesimon.rvs(1.5, size=20_000, random_state=s)).rho for s in range(4)]
    assert abs(np.mean(got) - 1.5) < .02


def test_a_pure_function_of_the_generator():
    x = torch.randint(16, (8, 40), generator=gen(0)); a, b = (language_report({'x': x}, 16, boots=5, generator=gen(3)) for _ in range(2))
    assert a.rows == b.rows and set(a.rows) == {'x', 'x, shuffled', 'uniform draws', 'random typing'} and '<table>' in a._repr_html_()
    assert torch.equal(simon_process(50, .3, gen(1)), simon_process(50, .3, gen(1))) and torch.equal(random_typing(50, 20, generator=gen(1)), random_typing(50, 20, generator=gen(1)))
    y = torch.where(x == 3, 15, x); assert language_report({'y': y}, 16, controls=False, boots=0, other=15).rows['y']['zipf'] != language_report({'y': y}, 16, controls=False, boots=0).rows['y']['zipf']


def test_association_against_sklearn():
    from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
    x, y = (torch.randint(k, (400,), generator=gen(k)) for k in (7, 4)); a = token_label_association(x, y, 0)
    assert math.isclose(a.nmi, normalized_mutual_info_score(y, x)); P = np.histogram2d(x, y, (7, 4))[0]/400
    assert math.isclose(float((torch.tensor(P)*a.pmi).sum())*math.log(2), mutual_info_score(y, x), rel_tol=1e-6) and math.isclose(a.purity, P.max(1).sum())


def grammar(m, p, v, seed, holes=0., dtype=torch.float64):
    g = gen(seed); draw = lambda *s: (3*torch.randn(*s, generator=g, dtype=dtype)).masked_fill(torch.rand(*s, generator=g) < holes, -math.inf)
    R, E, S = draw(m, (m + p)**2), draw(p, v), draw(m); R[:, -1] = 0; E[:, 0] = 0; S[0] = 0
    return R.log_softmax(-1).reshape(m, m + p, m + p), E.log_softmax(-1), S.log_softmax(-1)


def trees_sum(R, E, S, w): # the definition, in linear space
    R, E, S, m = R.exp().numpy(), E.exp().numpy(), S.exp().numpy(), len(S)
    @lru_cache(None)
    def down(i, j): # vector over symbols
        if i == j: return np.concatenate([np.zeros(m), E[:, w[i]]])
        return np.concatenate([sum(np.einsum('abc,b,c->a', R, down(i, k), down(k + 1, j)) for k in range(i, j)), np.zeros(len(E))])
    return S@down(0, len(w) - 1)[:m]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 8), st.integers(0, 10**6), st.sampled_from([0., .5]))
def test_inside_is_the_sum_over_trees(m, p, n, seed, holes):
    G = grammar(m, p, 5, seed, holes); x = torch.randint(5, (3, n), generator=gen(seed)); L = torch.randint(2, n + 1, (3,), generator=gen(seed + 1))
    got = pcfg_inside(*G, x, L).exp().tolist()
    for w, l, y in zip(x.tolist(), L.tolist(), got): assert math.isclose(y, trees_sum(*G, tuple(w[:l])), rel_tol=1e-8, abs_tol=1e-300)
    low = pcfg_inside(*(t.float() for t in G), x, L); ok = torch.isfinite(low)
    assert torch.allclose(low[ok].double(), pcfg_inside(*G, x, L)[ok], atol=2e-3)


def test_gradients_are_expected_counts_and_finite():
    R, E, S = (t.requires_grad_() for t in grammar(2, 3, 4, 7, .4)); x = torch.randint(4, (6, 6), generator=gen(0)); lp = pcfg_inside(R, E, S, x)
    lp[torch.isfinite(lp)].sum().backward(); k = torch.isfinite(lp).sum().item(); assert k
    for t, per in ((R, 5), (E, 6), (S, 1)): assert torch.isfinite(t.grad).all() and math.isclose(t.grad.sum().item(), per*k, rel_tol=1e-9)
    G = grammar(2, 2, 3, 1); assert torch.autograd.gradcheck(lambda *g: pcfg_inside(*(t.flatten(1).log_softmax(-1).reshape(t.shape) if t.ndim > 1 else t.log_softmax(-1) for t in g), x[:2, :4] % 3), [t.clone().requires_grad_() for t in G])


def test_parse_finds_the_tree_of_an_unambiguous_grammar(tmp_path):
    # one phrase: A -> L A | L R, words 0 = L, 1 = R: right-branching by force
    model = NeuralPCFG(1, 2, 2); R = torch.full((1, 3, 3), -math.inf); R[0, 1, 0] = R[0, 1, 2] = math.log(.5)
    model.rules = lambda: (R, torch.tensor([[0., -math.inf], [-math.inf, 0.]]), torch.zeros(1))
    x = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]]); assert model.parse(x, torch.tensor([4, 2])) == [(0, (1, (2, 3))), (0, 1)]
    assert math.isclose(model.inside(x, torch.tensor([4, 2]))[0].item(), 3*math.log(.5), rel_tol=1e-5) and torch.allclose(model(x[:1]), torch.zeros(1), atol=1e-5)
    a = NeuralPCFG(2, 3, 5); a.save_pretrained(tmp_path); b = NeuralPCFG.from_pretrained(tmp_path); y = torch.randint(5, (2, 6), generator=gen(0))
    assert torch.equal(a(y), b(y))


def test_what_the_past_is_worth():
    x = torch.arange(6).repeat(8, 10); assert context_gain(x, x, 6).min() > 2.2 and context_gain(x[:, None].expand(-1, 3, -1), x[:, None].expand(-1, 3, -1), 6, 1, 'down').min() > 2.2
    assert (novelty_rate(x, x, 3) == 0).all() and ngram_bits(x, x, 2, 6)[1].max() < ngram_bits(x, x, 2, 6)[0].min()
    with pytest.raises(ValueError, match='lag'): context_gain(x, x, 6, lag=0)
