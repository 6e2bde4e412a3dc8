"""What a notebook is the wrong place for: brute force, finite differences, gensim, torch's own AdaGrad, scikit-learn, random lengths."""
import math
from collections import Counter
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from tokbook.text.word_doc_embeddings import *

gen = lambda s=0: torch.Generator().manual_seed(s)
def stream(seed=0, n=400, v=12): # Zipfian ids, texts of random length
    g = gen(seed); p = 1/torch.arange(1., v + 1)
    x = torch.multinomial(p, n, True, generator=g); x[torch.rand(n, generator=g) < .1] = BREAK
    return x
def model(kind, vocab=12, dim=4, window=2, seed=0, **kw): # nothing is zero, so that every gradient is seen
    torch.manual_seed(seed); m = ContextModel(kind, vocab, dim, window, **kw)
    for p in m.parameters(): nn.init.normal_(p, std=.5)
    return m
streams = st.lists(st.integers(-1, 6), min_size=1, max_size=60)

# windows, counts, noise ------------------------------------------------------------------------------------------------------
def texts_of(ids):
    out = [[]]
    for i in ids: out[-1].append(i) if i != BREAK else out.append([])
    return out

@settings(deadline=None, max_examples=60)
@given(streams, st.integers(1, 4))
def test_windows_by_hand(ids, m):
    want = [([t[j] if 0 <= j < len(t) else BREAK for j in (*range(i - m, i), *range(i + 1, i + m + 1))], w) for t in texts_of(ids) for i, w in enumerate(t)]
    c, t = context_windows(torch.tensor(ids), m)
    assert c.tolist() == [a for a, _ in want] and t.tolist() == [b for _, b in want]

@settings(deadline=None, max_examples=60)
@given(streams, st.integers(1, 5), st.booleans())
def test_cooccurrence_by_hand(ids, m, weigh):
    want = torch.zeros(7, 7, dtype=torch.double)
    for t in texts_of(ids):
        for i in range(len(t)):
            for j in range(len(t)):
                if 0 < abs(i - j) <= m: want[t[i], t[j]] += 1/abs(i - j) if weigh else 1
    X = word_cooccurrence(torch.tensor(ids), m, 7, weigh)
    assert torch.allclose(X.to_dense(), want) and X.is_coalesced()
    assert torch.equal(X.indices(), X.to_dense().to_sparse().indices())

def test_windows_count_what_cooccurrence_counts():
    ids = stream(); c, t = context_windows(ids, 3)
    X = torch.zeros(12, 12, dtype=torch.double)
    for j in range(6): ok = c[:, j] != BREAK; X.index_put_((t[ok], c[ok, j]), torch.ones(int(ok.sum())).double(), accumulate=True)
    assert torch.equal(X, word_cooccurrence(ids, 3, 12, distance_weight=False).to_dense())

@pytest.mark.parametrize('k', [1, 5])
def test_ppmi(k):
    X = torch.poisson(torch.full((9, 7), 3.), generator=gen()).double(); N = X.sum()
    want = (X*N/(X.sum(1, keepdim=True)*X.sum(0))).log().sub(math.log(k)).clamp(min=0)
    assert torch.allclose(ppmi_matrix(X, k), want) and torch.allclose(ppmi_matrix(X.to_sparse(), k).to_dense(), want)

def test_noise_law():
    counts = torch.tensor([100, 0, 10, 1]); s = NegativeSampler(counts)
    f = torch.bincount(s.draw(200_000, generator=gen()), minlength=4)/200_000
    p = counts.double()**.75; p /= p.sum()
    assert f[1] == 0 and (f - p).abs().max() < .004
    assert torch.equal(s.draw(5, 2, generator=gen(3)), s.draw(5, 2, generator=gen(3)))
    for u in (0., 1 - 1e-16): assert counts[torch.searchsorted(s.cdf, torch.tensor([u], dtype=torch.double), right=True)] > 0
    trailing = NegativeSampler(torch.tensor([3, 2, 0, 0]))
    assert trailing.draw(1000, generator=gen()).max() == 1

def test_thinning_keeps_the_expected_share():
    counts = torch.tensor([90_000, 9_000, 1_000]); ids = torch.arange(3).repeat_interleave(counts)
    kept = torch.bincount(drop_frequent(ids, counts, 1e-2, gen()), minlength=3)/counts
    assert torch.allclose(kept, (1e-2*counts.sum()/counts).sqrt().clamp(max=1), atol=.03)

# the six models --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ranking', [False, True])
def test_finite_differences(kind, ranking):
    m = model(kind).double(); c, t = context_windows(stream(1, 40), 2); noise = NegativeSampler(torch.ones(12))
    def value(): torch.manual_seed(3); return m.loss((c, t), noise, shared=3, ranking=ranking)
    value().backward()
    for name, p in m.named_parameters():
        g = p.grad.to_dense().flatten(); flat = p.data.view(-1)
        for i in torch.randperm(len(flat), generator=gen())[:6].tolist():
            old = flat[i].item(); up, down = (flat.__setitem__(i, old + s*1e-6) or value().item() for s in (1, -1)); flat[i] = old
            assert abs((up - down)/2e-6 - g[i].item()) < 1e-6, (name, i)

@pytest.mark.parametrize('kind', KINDS)
def test_score_by_hand(kind):
    m = model(kind, hidden=3 if kind in ('lbl', 'nnlm', 'cw') else None); c, t = context_windows(stream(2, 30), 2); t = t[:, None]
    s = m.score(c, t); E, P = m.E.weight, dict(m.named_parameters())
    for b in range(len(t)):
        ctx = [E[i] if i >= 0 else torch.zeros(4) for i in c[b].tolist()]; x = torch.cat(ctx); w = t[b, 0]
        if kind == 'skipgram': want = torch.stack([m.O.weight[w]@e for e in ctx])
        elif kind == 'cbow': want = m.O.weight[w]@sum(ctx)/max(1, int((c[b] >= 0).sum()))
        elif kind == 'order': want = m.O.weight[w]@x
        elif kind == 'lbl': want = m.O.weight[w]@(P['H.weight']@x)
        elif kind == 'nnlm': want = m.O.weight[w]@torch.tanh(P['H.weight']@x + P['H.bias'])
        else: want = P['u.weight'][0]@torch.tanh(P['H.weight']@x + P['H.bias'] + P['W.weight']@E[w])
        assert torch.allclose(s[b, ..., 0], want, atol=1e-6)
    same = torch.tensor([3, 1, 4]); assert torch.allclose(m.score(c, same), m.score(c, same.expand(len(c), 3)), atol=1e-6) # (k,) is (b, k) with equal rows

def test_family_relations():
    c, t = context_windows(stream(3, 60), 2); t = t[:, None]
    order, lbl, nnlm, skip, cbow = (model(k, hidden=16 if k in ('lbl', 'nnlm') else None) for k in ('order', 'lbl', 'nnlm', 'skipgram', 'cbow'))
    for m in (lbl, nnlm, skip, cbow): m.E.weight.data = order.E.weight.data
    for m in (lbl, nnlm): m.O.weight.data = order.O.weight.data; m.H.weight.data = torch.eye(16)
    assert torch.allclose(lbl.score(c, t), order.score(c, t), atol=1e-6)                     # H = I: LBL is Order
    nnlm.H.weight.data = 1e-3*torch.eye(16); nnlm.H.bias.data.zero_(); nnlm.O.weight.data = 1e3*order.O.weight.data
    assert torch.allclose(nnlm.score(c, t), order.score(c, t), atol=1e-3)                    # tanh x = x: NNLM is LBL
    order.O.weight.data = skip.O.weight.data.repeat(1, 4)                                    # the same block for every place: Order is the sum of Skip-grams,
    assert torch.allclose(order.score(c, t), skip.score(c, t).sum(1), atol=1e-5)
    cbow.O.weight.data = skip.O.weight.data                                                  # and CBOW is their mean
    assert torch.allclose(cbow.score(c, t), skip.score(c, t).sum(1)/(c != BREAK).sum(1, keepdim=True).clamp(min=1), atol=1e-5)

def test_order_matters_to_those_that_look():
    c, t = context_windows(torch.arange(9), 2); c, t = c[4:5], t[4:5, None]; turned = c.flip(1)
    for kind in KINDS:
        a, b = (model(kind).score(x, t).sum() for x in (c, turned))
        assert (torch.allclose(a, b, atol=1e-6)) == (kind in ('skipgram', 'cbow')), kind

def test_skipgram_from_counts_is_skipgram_from_text():
    "With every noise word weighed by its probability, the loss summed over a stream is the loss summed over its pair counts."
    m = model('skipgram').double(); ids = stream(4, 800); c, t = context_windows(ids, 2)
    X = word_cooccurrence(ids, 2, 12, distance_weight=False).to_dense(); q = NegativeSampler(torch.bincount(ids[ids >= 0], minlength=12))
    S = m.E.weight@m.O.weight.T                                              # S[c, w]
    counts = (X.T*F.softplus(-S)).sum() + (X.sum(0)[:, None]*q.k*q.p*F.softplus(S)).sum()
    every = m.score(c, torch.arange(12)); real = c != BREAK
    text = ((F.softplus(-m.score(c, t[:, None])[..., 0]) + q.k*(F.softplus(every)@q.p))*real).sum()
    assert torch.allclose(counts, text)

# training --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('n', [3, 40]) # few rows of the table, and more than half
def test_adagrad_rows_is_adagrad(n):
    table, ref = torch.randn(20, 3, generator=gen()), nn.Parameter(torch.randn(20, 3, generator=gen()))
    total, opt = torch.full_like(table, 1e-8), torch.optim.Adagrad([ref], lr=.1, initial_accumulator_value=1e-8, eps=0)
    for step in range(4):
        rows, grad = torch.randint(20, (n,), generator=gen(step)), torch.randn(n, 3, generator=gen(step))
        adagrad_rows_(table, total, rows, grad, .1)
        ref.grad = torch.zeros(20, 3).index_add_(0, rows, grad); opt.step()
        assert torch.allclose(table, ref, atol=1e-5), step

@pytest.mark.parametrize('kind', ['skipgram', 'cbow'])
def test_tile_is_autograd(kind):
    m = model(kind, vocab=30, dim=5); c, t = context_windows(stream(5, 200, 30), 2); noise = torch.randint(30, (8,), generator=gen())
    tables = m.E.weight.detach().clone(), m.O.weight.detach().clone(); totals = tuple(torch.full_like(x, 1e-8) for x in tables)
    opt, fixed = RowAdaGrad(m.parameters(), lr=.1), NegativeSampler(torch.ones(30)); fixed.draw = lambda *s: noise
    for _ in range(3):
        opt.zero_grad(); loss = m.loss((c, t), fixed, shared=8); loss.backward(); opt.step()
        assert torch.allclose(sgns_tile_(tables, totals, c, t, noise, 5, .1, kind == 'cbow'), loss, rtol=1e-5)
        assert torch.allclose(tables[0], m.E.weight, atol=2e-5) and torch.allclose(tables[1], m.O.weight, atol=2e-5)

@pytest.mark.parametrize('sg', [1, 0])
def test_gensim_makes_the_same_step(sg):
    "gensim's word2vec on one text with its noise word pinned: our loss, plain SGD, the same tables; but for CBOW's well-known factor."
    from gensim.models.word2vec import Word2Vec
    text = [['a', 'b', 'c']]
    w = Word2Vec(vector_size=6, window=1, min_count=1, sg=sg, hs=0, negative=1, cbow_mean=1, sample=0, seed=1, workers=1, shrink_windows=False, alpha=.1, min_alpha=.1)
    w.build_vocab(text); ix = w.wv.key_to_index; rng = np.random.default_rng(0)
    w.wv.vectors[:] = rng.normal(size=(3, 6)); w.syn1neg[:] = rng.normal(size=(3, 6))
    E0, O0 = w.wv.vectors.copy(), w.syn1neg.copy()
    w.cum_table[:] = 0; w.cum_table[ix['b']:] = 2**31 - 1                        # noise is always b: a step on target a or c draws b
    w.train(text, total_examples=1, epochs=1, start_alpha=.1, end_alpha=.1, compute_loss=True)
    E, O = torch.tensor(E0, dtype=torch.double), torch.tensor(O0, dtype=torch.double); b = torch.tensor([ix['b']])
    for i, word in enumerate(text[0]):                                           # plain SGD, one window after the other
        around = [ix[text[0][j]] for j in (i - 1, i + 1) if 0 <= j < 3]
        # gensim's skip-gram predicts the word in the middle from each word around, one at a time; its CBOW from their mean at once
        for group in ([[j] for j in around] if sg else [around]):
            e, o = E.clone().requires_grad_(), O.clone().requires_grad_()
            x, t = e[group].mean(0), ix[word]
            loss = F.softplus(-x@o[t]) + (F.softplus(x@o[b[0]]) if t != b[0] else 0.)
            loss.backward(); E -= .1*e.grad*len(group); O -= .1*o.grad # CBOW: gensim, like word2vec, gives each context word the mean's whole gradient, not its share
    assert np.allclose(O.numpy(), w.syn1neg, atol=2e-3)
    assert np.allclose(E.numpy(), w.wv.vectors, atol=2e-3)

def two_topics(seed=0, n=600): # words 0..9 belong together, and 10..19
    g = gen(seed); side = torch.randint(2, (n, 1), generator=g)
    return torch.cat([torch.randint(10, (n, 8), generator=g) + 10*side, torch.full((n, 1), BREAK)], 1).flatten()
def apart(E): U = F.normalize(E - E.mean(0), dim=1); S = U@U.T; return (S[:10, :10].mean() + S[10:, 10:].mean())/2 - S[:10, 10:].mean()

@pytest.mark.parametrize('kind', [*KINDS, 'glove'])
def test_one_trainer_for_all(kind):
    ids = two_topics(); torch.manual_seed(0)
    m = GloVe(20, 8, 3) if kind == 'glove' else ContextModel(kind, 20, 8, 3)
    before = apart(m.vectors); seen = []
    h = fit_word_vectors(m, ids, epochs=20 if kind == 'glove' else 8, bs=100, threshold=None, valid=0 if kind == 'glove' else 10, probe=lambda m: apart(m.vectors).item())
    assert h.probes[-1] > before + .5 and h.curve(smooth=10)[-1] < h.curve()[0]
    if kind != 'glove': assert len(h.valid['loss']) == 8 == len(h.probes)

def test_same_seed_same_vectors_and_fast_path():
    ids = two_topics()
    a, b = (fit_sgns(ids, 20, 8, 3, epochs=4, bs=100, threshold=None, seed=1) for _ in range(2))
    assert torch.equal(a[0], b[0]) and apart(a[0]) > .5 and apart(fit_sgns(ids, 20, 8, 3, mean=True, epochs=4, bs=100, threshold=None)[0]) > .5
    def vectors(): torch.manual_seed(0); m = ContextModel('cbow', 20, 8, 3); fit_word_vectors(m, ids, epochs=1, bs=100); return m.vectors
    assert torch.equal(vectors(), vectors())

def test_held_out_texts_are_not_trained_on():
    "The trap of the published code, whose skip-gram branch trains on its validation text: a text that only the validation has leaves its words untouched."
    ids = two_topics(n=40).view(40, 9).clone(); ids[::10] = torch.tensor([*range(20, 28), BREAK])    # words 20..27 are in every tenth text only
    torch.manual_seed(0); m = ContextModel('skipgram', 28, 8, 3); E = m.vectors.clone()
    fit_word_vectors(m, ids.flatten(), epochs=2, bs=20, threshold=None, valid=10, seed=0)
    assert torch.equal(m.vectors[20:], E[20:]) and not torch.equal(m.vectors[:20], E[:20])

# words made of characters -----------------------------------------------------------------------------------------------------
def test_char_word():
    words = ['ab', 'ba', 'c', 'abc']; torch.manual_seed(0); m = CharWordCBOW(words, 4, 2, joint=.5)
    for i, w in enumerate(words):
        assert torch.allclose(m.vectors[i], (m.E.weight[i] + sum(m.C.weight[m.chars[c]] for c in w)/len(w))/2, atol=1e-6)
    assert torch.allclose(m.compose('cxb'), m.C.weight[[m.chars['c'], m.chars['b']]].mean(0))
    c, t = torch.tensor([[0, 1, BREAK, 3]]), torch.tensor([2])
    assert torch.allclose(m.features(c)[0], m.vectors[[0, 1, 3]].mean(0), atol=1e-6)
    m.loss((c, t), NegativeSampler(torch.ones(4))).backward()
    assert m.C.weight.grad is not None and m.P.weight.grad is not None
    with pytest.raises(ValueError): CharWordCBOW(['a', ''])
    with pytest.raises(ValueError): m.compose('xyz')

# evaluation --------------------------------------------------------------------------------------------------------------------
def test_evaluation_against_gensim(tmp_path):
    from gensim.models import KeyedVectors
    g = gen(); E = torch.randn(40, 6, generator=g); kv = KeyedVectors(6); kv.add_vectors([f'w{i}' for i in range(40)], E.numpy())
    q = torch.stack([torch.randperm(40, generator=g)[:4] for _ in range(200)]); q[:100, 3] = 7        # some questions share an answer
    (tmp_path/'q.txt').write_text(': all\n' + '\n'.join(' '.join(f'w{i}' for i in r) for r in q.tolist()) + '\n')
    acc, _ = kv.evaluate_word_analogies(str(tmp_path/'q.txt'))
    assert abs(evaluate_analogy(E, q, chunk=33) - acc) < 1e-9
    p = [(a, b, s) for a, b, s in zip(*torch.randint(40, (2, 50), generator=g).tolist(), torch.rand(50, generator=g).tolist())]
    (tmp_path/'p.tsv').write_text('\n'.join(f'w{a}\tw{b}\t{s}' for a, b, s in p))
    pearson, spearman, _ = kv.evaluate_word_pairs(str(tmp_path/'p.tsv'))
    assert abs(evaluate_similarity(E, p) - spearman[0]) < 1e-6 and abs(evaluate_similarity(E, p, 'pearson') - pearson[0]) < 1e-6

def test_evaluation_refuses():
    E = torch.eye(4)
    with pytest.raises(ValueError): evaluate_analogy(E, torch.tensor([[0, 1, 2, -1]]))
    with pytest.raises(ValueError): evaluate_similarity(E, [(0, 1, .5), (0, -1, .2)])
    with pytest.raises(ValueError): evaluate_similarity(E, [(0, 9, .5), (0, 1, .2)])
    with pytest.raises(ValueError): performance_gain_ratio(.5, .3, .3)
    assert performance_gain_ratio(.5, .3, .7) == pytest.approx(.5)

# documents -----------------------------------------------------------------------------------------------------------------------
def rcnn(d=5, seed=0, **kw): torch.manual_seed(seed); return RCNN(d, 4, 6, **kw)

def test_rcnn_by_hand():
    m = rcnn(n_out=3); x = torch.randn(2, 7, 5, generator=gen()); n = [7, 4]
    got, where = m(x, torch.tensor(n), return_index=True)
    for b in range(2):
        l, r = [m.first], [m.last]
        for i in range(n[b] - 1): l.append(torch.tanh(m.left.weight_hh_l0@l[-1] + m.left.weight_ih_l0@x[b, i]))
        for i in range(n[b] - 1, 0, -1): r.insert(0, torch.tanh(m.right.weight_hh_l0@r[0] + m.right.weight_ih_l0@x[b, i]))
        y = torch.stack([torch.tanh(m.mix(torch.cat([l[i], x[b, i], r[i]]))) for i in range(n[b])])
        assert torch.allclose(got[b], m.out(y.amax(0)), atol=1e-5) and torch.equal(where[b], y.argmax(0))

@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 99))
def test_padding_changes_nothing(lengths, extra, seed):
    n = torch.tensor(lengths); x = torch.randn(len(n), max(lengths) + extra, 5, generator=gen(seed))
    for m in (rcnn(n_out=2), WindowCNN(5, 3, 6, 2), WindowCNN(5, 4, 6, 2)):
        got = m(x, n); junk = x.clone()
        for b, k in enumerate(lengths): junk[b, k:] = 100.
        assert torch.allclose(m(junk, n), got, atol=1e-5)
        for b, k in enumerate(lengths): assert torch.allclose(m(x[b:b + 1, :k]), got[b:b + 1], atol=1e-5)

def test_rcnn_mirror():
    m, w, x = rcnn(n_out=3), rcnn(n_out=3), torch.randn(2, 6, 5, generator=gen())
    w.left, w.right, w.first, w.last = m.right, m.left, m.last, m.first
    w.mix.weight.data = torch.cat([m.mix.weight[:, 9:], m.mix.weight[:, 4:9], m.mix.weight[:, :4]], 1).detach()
    w.mix.bias, w.out = m.mix.bias, m.out
    n = torch.tensor([6, 4]); turned = torch.stack([torch.cat([x[b, :k].flip(0), x[b, k:]]) for b, k in enumerate(n.tolist())])
    assert torch.allclose(w(turned, n), m(x, n), atol=1e-5)

def test_rcnn_without_recurrence_is_a_window_of_three():
    m, c = rcnn(n_out=3), WindowCNN(5, 3, 6, 3)
    for r in (m.left, m.right): r.weight_hh_l0.data.zero_()
    x = torch.randn(3, 8, 5, generator=gen())
    y = torch.tanh(m.mix(torch.cat([torch.tanh(x[:, :-2]@m.left.weight_ih_l0.T), x[:, 1:-1], torch.tanh(x[:, 2:]@m.right.weight_ih_l0.T)], -1)))
    m.out = None; assert torch.allclose(m(x)[:, 1:-1], y, atol=1e-5)                          # inside, each vector sees three words, as a convolution does
    far = x.clone(); far[:, 5] += 1.; changed = (m(far) - m(x)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [i in (4, 5, 6) for i in range(8)]
    far = x.clone(); far[:, 5] += 1.; m = rcnn(); assert ((m(far) - m(x)).abs().amax((0, 2)) > 1e-6).all()   # with it, every word sees every other

def test_contexts_exclude_the_word_itself():
    m, x = rcnn(), torch.randn(1, 6, 5, generator=gen(), requires_grad=True)
    l, r = m.contexts(x, None); (gl,), (gr,) = (torch.autograd.grad(c[0, 3].sum(), x, retain_graph=True) for c in (l, r))
    assert (gl.abs().sum(-1)[0] > 0).tolist() == [True]*3 + [False]*3 and (gr.abs().sum(-1)[0] > 0).tolist() == [False]*4 + [True]*2

def test_readers_refuse():
    x = torch.zeros(2, 3, 5)
    for m in (rcnn(n_out=2), WindowCNN(5)):
        for bad in ([0, 3], [1, 4], [1]):
            with pytest.raises(ValueError): m(x, torch.tensor(bad))
    with pytest.raises(ValueError): RCNN(5, act='gelu')
    with pytest.raises(ValueError): RCNN(0)
    with pytest.raises(ValueError): WindowCNN(5, 0)
    with pytest.raises(ValueError): DocumentReader(rcnn(), 4, 5, torch.zeros(3, 5))
    with pytest.raises(ValueError): DocumentReader(rcnn(n_out=2), 4, 5)(torch.full((1, 3), BREAK))
    with pytest.raises(ValueError): order_documents(3, length=20)
    with pytest.raises(ValueError): window_ceiling(0)

@pytest.mark.parametrize('width', [3, 7])
def test_ceiling_is_reached_by_the_best_window_reader(width):
    ids, y = order_documents(4000, generator=gen()); marks = (ids >= 48).nonzero()[:, 1].view(-1, 2)
    assert (ids[torch.arange(4000), marks[:, 0]] - 48 == y).all() and marks.min() >= 12 and marks.max() < 40 - 12
    gap = marks[:, 1] - marks[:, 0]; seen = gap < width                       # both markers in one window: known; else: a guess
    assert gap.min() == 1 and gap.max() == 12
    acc = torch.where(seen, 1., .5).mean().item(); assert abs(acc - window_ceiling(width)) < .02

def test_rcnn_on_a_transformer():
    from transformers import BertConfig, BertModel
    torch.manual_seed(0); bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).eval()
    ids = torch.randint(50, (2, 7), generator=gen()); mask = torch.tensor([[1]*7, [1]*4 + [0]*3])
    with torch.no_grad(): h = bert(ids, attention_mask=mask).last_hidden_state
    m = rcnn(16, n_out=3); a, b = m(h, mask.sum(1)), m(h[1:, :4])
    assert a.shape == (2, 3) and torch.allclose(a[1:], b, atol=1e-5)

# refusals -------------------------------------------------------------------------------------------------------------------------
def test_refusals():
    ids = stream()
    with pytest.raises(ValueError): WordIndex([['a', 'b']], 2)
    with pytest.raises(ValueError): context_windows(ids, 0)
    with pytest.raises(ValueError): drop_frequent(ids, torch.ones(3), 1e-3)
    with pytest.raises(ValueError): NegativeSampler(torch.zeros(0))
    with pytest.raises(ValueError): NegativeSampler(torch.zeros(3))
    with pytest.raises(ValueError): ContextModel('bert', 5)
    with pytest.raises(ValueError): ContextModel('cbow', 5, window=0)
    with pytest.raises(ValueError): model('cbow').score(torch.tensor([[0, 1]]), torch.tensor([[12]]))
    with pytest.raises(ValueError): model('order').score(torch.tensor([[0, 1]]), torch.tensor([[1]]))
    with pytest.raises(ValueError): sgns_loss(torch.zeros(3, 1))
    with pytest.raises(ValueError): ranking_loss(torch.zeros(3, 2), margin=-1)
    with pytest.raises(ValueError): word_cooccurrence(ids, 0, 12)
    with pytest.raises(ValueError): word_cooccurrence(ids, 2, 5)
    with pytest.raises(ValueError): ppmi_matrix(-torch.ones(2, 2))
    with pytest.raises(ValueError): double_center(torch.ones(3))
    with pytest.raises(ValueError): GloVe(0)
    with pytest.raises(ValueError): GloVe(3, 2).loss((torch.tensor([0]), torch.tensor([1]), torch.tensor([0.])))
    with pytest.raises(ValueError): adagrad_rows_(torch.zeros(3, 2), torch.zeros(3, 1), torch.tensor([0]), torch.zeros(1, 2), .1)
    with pytest.raises(ValueError): RowAdaGrad([nn.Parameter(torch.zeros(1))], lr=-1)
    with pytest.raises(ValueError): fit_word_vectors(model('cbow', vocab=3), ids)
    with pytest.raises(ValueError): fit_sgns(ids, 3)
    with pytest.raises(ValueError): sgns_tile_((torch.zeros(3, 2),)*2, (torch.ones(3, 2),)*2, torch.tensor([[0]]), torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ValueError): average_vectors(torch.zeros(3, 2), ids)

def test_average_vectors():
    E = torch.eye(3); ids = torch.tensor([0, 1, BREAK, BREAK, 2, 2, BREAK])
    assert average_vectors(E, ids).tolist() == [[.5, .5, 0], [0, 0, 0], [0, 0, 1]]
    assert average_vectors(E, ids[:-1]).tolist() == average_vectors(E, ids).tolist()
