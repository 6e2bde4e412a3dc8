"""What a notebook is the wrong place for: random dictionaries and texts against brute force, independent implementations, traps."""
import json, math, os
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
from itertools import product
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.data import MarkovSource
from tokbook.text.tokenization_theory import *
from tokbook.text.tokenization_theory import _UNI

SOURCE = MarkovSource.switching(.8, .7, order=2)
def text(n, seed=0, source=SOURCE): return source.sample(1, n, generator=torch.Generator().manual_seed(seed))[0]
symbols = lambda a, hi=120: st.lists(st.integers(0, a - 1), min_size=1, max_size=hi)

@st.composite
def dictionaries(draw, alphabet=3):
    words = draw(st.lists(st.lists(st.integers(0, alphabet - 1), min_size=2, max_size=6).map(tuple), max_size=25, unique=True))
    return draw(st.permutations([(a,) for a in range(alphabet)] + words))

def greedy_by_hand(vocab, x):
    ids, x, out, i = {t: k for k, t in enumerate(vocab)}, tuple(x), [], 0
    while i < len(x):
        n = max(n for n in range(1, min(7, len(x) - i + 1)) if x[i:i + n] in ids)
        out.append(ids[x[i:i + n]]); i += n
    return out

@settings(deadline=None, max_examples=60)
@given(dictionaries(), symbols(3))
def test_greedy_is_longest_match(vocab, x):
    tok, x = GreedyEncoder(vocab, 3), torch.tensor(x)
    t = tok.encode(x)
    assert t.tolist() == greedy_by_hand(vocab, x.tolist())
    assert torch.equal(tok.decode(t), x) and t.dtype == torch.int64

@settings(deadline=None, max_examples=60)
@given(dictionaries(), symbols(3, 9))
def test_fewest_tokens_is_minimal(vocab, x):
    tok, words = MinTokenEncoder(vocab, 3), set(vocab)
    t = tok.encode(torch.tensor(x)); n = len(x)
    assert tok.decode(t).tolist() == x
    best = min(1 + sum(cuts) for cuts in product((0, 1), repeat=n - 1)               # every way to cut the text
               if all(tuple(p) in words for p in np.split(np.array(x), [i + 1 for i, c in enumerate(cuts) if c])))
    assert len(t) == best <= len(GreedyEncoder(vocab, 3).encode(torch.tensor(x)))

@settings(deadline=None, max_examples=40)
@given(dictionaries(), st.integers(1, 7), st.integers(1, 30), st.integers(0, 10**6))
def test_batches_equal_single_texts(vocab, b, n, seed):
    x = torch.randint(3, (b, n), generator=torch.Generator().manual_seed(seed))
    for tok in (GreedyEncoder(vocab, 3), MinTokenEncoder(vocab, 3), BPETokenizer([(0, 1), (3, 2), (2, 2)], 3), NGramTokenizer(2, 3)):
        tokens, mask = tok.encode_batch(x)
        assert (tokens[~mask] == 0).all()
        for row, m, one in zip(tokens, mask, x): assert torch.equal(row[m], tok.encode(one))

@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=400))
def test_orbit(steps):
    nxt = torch.arange(len(steps)) + torch.tensor(steps); want, i = [], 0
    while i < len(steps): want.append(i); i = nxt[i].item()
    for impl in ('auto', 'blocks', 'doubling'): assert orbit(nxt, impl).tolist() == want

@settings(deadline=None, max_examples=80)
@given(symbols(3, 60), st.integers(0, 2), st.integers(0, 2))
def test_merge_goes_left_to_right_without_overlap(x, a, b):
    want, i = [], 0
    while i < len(x):
        hit = x[i:i + 2] == [a, b]; want.append(9 if hit else x[i]); i += 1 + hit
    assert merge_pair(torch.tensor(x), a, b, 9).tolist() == want

def bpe_by_hand(docs, size, alphabet): # one page of BPE: recount everything for every merge; most frequent pair, lowest ids first
    merges, vocab = [], [(a,) for a in range(alphabet)]
    while len(vocab) < size:
        count = {}
        for d in docs:
            for p in zip(d, d[1:]): count[p] = count.get(p, 0) + 1
        a, b = min(count, key=lambda p: (-count[p], p)); merges.append((a, b)); vocab.append(vocab[a] + vocab[b])
        docs = [merge_pair(torch.tensor(d), a, b, len(vocab) - 1).tolist() for d in docs]
    return merges, vocab

@pytest.mark.parametrize('alphabet,size', [(2, 40), (4, 30)])
def test_bpe_training_equals_the_one_page_version(alphabet, size):
    x = text(6000) if alphabet == 2 else torch.randint(4, (6000,), generator=torch.Generator().manual_seed(1))**2//3
    tok = BPETokenizer.train(x, size, alphabet)
    merges, vocab = bpe_by_hand([d.tolist() for d in x.split(1024)], size, alphabet)
    assert [m[:2] for m in tok.merges] == merges and tok.vocab == vocab

@pytest.mark.parametrize('size', [8, 64, 300])
def test_bpe_encoding_equals_hugging_face(size):
    tok, x = BPETokenizer.train(text(30_000), size), text(5000, 1)
    assert tok.encode(x).tolist() == tok.to_hf().encode(''.join(chr(_UNI + c) for c in x.tolist())).ids
    for d in (2, 5, size):                                                       # nested: the first merges are the smaller tokenizer
        assert torch.equal(tok.encode_nested(x, [d])[d], tok.truncate(d).encode(x))
        assert tok.truncate(d).vocab == BPETokenizer.train(text(30_000), d).vocab

def test_two_merges_may_make_one_string():
    tok = BPETokenizer([(0, 1), (2, 0), (1, 0), (0, 4)], 2)                        # 01, 010, 10 and, once more, 010
    assert tok.vocab == [(0,), (1,), (0, 1), (0, 1, 0), (1, 0)] and [m[2] for m in tok.merges] == [2, 3, 4, 3]
    assert tok.truncate(5).vocab == tok.vocab and tok.truncate(4).vocab == tok.vocab[:4]
    assert torch.equal(tok.decode(tok.encode(text(500))), text(500))
    with pytest.raises(ValueError): BPETokenizer([(0, 1), (3, 0)], 2)

def test_lzw_is_prefix_closed_nested_and_equal_to_the_textbook():
    x = text(20_000); vocab = lzw_vocab(x, 500)
    known = set(vocab); assert all(t[:-1] in known for t in vocab if len(t) > 1)
    assert vocab[:100] == lzw_vocab(x, 100)
    s, d, w, out = ''.join(map(str, x.tolist())), {'0': 0, '1': 1}, '', []       # the compressor, on strings
    for c in s:
        if len(d) == 500: break
        if w + c in d: w += c
        else: d[w + c] = len(d); w = c
    assert [''.join(map(str, t)) for t in vocab] == list(d)

TOKENIZERS = dict(lzw=lambda: LZWTokenizer.train(text(5000), 11), bpe=lambda: BPETokenizer.train(text(5000), 9), pairs=lambda: NGramTokenizer(2, 2), fewest=lambda: MinTokenEncoder(lzw_vocab(text(5000), 11)))
@pytest.mark.parametrize('name', TOKENIZERS)
@pytest.mark.parametrize('m', [1, 4, 9])
def test_exact_loss_is_the_minimum_and_agrees_with_sampling(name, m):
    tok, r = TOKENIZERS[name](), exact_unigram_loss(TOKENIZERS[name](), SOURCE, m)
    assert r['entropy'] == pytest.approx(SOURCE.block_entropy(m)/m, abs=1e-9)
    assert r['loss'] >= r['entropy'] - 1e-9
    x = torch.cartesian_prod(*[torch.arange(2)]*m).view(-1, m); p = SOURCE.log_prob(x).exp(); enc = [tok.encode(o) for o in x]
    def loss(q): return sum(pi.item()*-q[t].log().sum().item() for pi, t in zip(p, enc))
    used = r['freq'] > 0; best = loss(r['freq'])
    g = torch.Generator().manual_seed(0)
    for _ in range(5):                                                           # no other token law does better
        other = r['freq'].clone(); other[used] *= torch.rand(int(used.sum()), generator=g, dtype=other.dtype) + .5
        assert loss(other/other.sum()) >= best - 1e-9
    draw = SOURCE.sample(4000, m, generator=g); t, mask = tok.encode_batch(draw)  # the empirical estimator
    cost = torch.where(mask, -r['freq'].log()[t], 0.).sum(1)
    assert abs(cost.mean() - best) < 4*cost.std()/4000**.5 + 1e-9

@pytest.mark.parametrize('k,p', [(1, .8), (2, .8), (3, .9)])
def test_uniform_model_bounds_unigram_and_entropy_bounds_both(k, p):
    s = MarkovSource.switching(p, p, order=k); x = text(100_000, 3, s)
    for tok in (LZWTokenizer.train(text(50_000, 4, s), 128), BPETokenizer.train(text(50_000, 4, s), 128), NGramTokenizer(6, 2)):
        t = tok.encode(x); loss = unigram_limit(torch.bincount(t, minlength=tok.vocab_size), tok.lengths)
        assert s.entropy_rate() - .01 < loss <= math.log(tok.vocab_size)*len(t)/len(x) + 1e-12
        b = greedy_bound(tok.vocab, s) if not isinstance(tok, BPETokenizer) else None
        if b: assert math.log(tok.vocab_size)*len(t)/len(x) <= b['bound']*1.01

def test_small_dictionaries_hurt_and_large_ones_help():
    s = MarkovSource.switching(.8, .8, order=2); x = text(50_000, 5, s)
    def loss(d, seed): tok = LZWTokenizer.train(text(40_000, seed, s), d); return unigram_limit(torch.bincount(tok.encode(x), minlength=d), tok.lengths)
    mean = {d: np.mean([loss(d, seed) for seed in range(10, 18)]) for d in (4, 64, 1024)}
    assert mean[1024] < mean[64] < math.log(2) < mean[4]                         # the curve is not monotone

def test_heavy_hitting_against_brute_force():
    vocab = lzw_vocab(text(3000), 40); known = set(vocab)
    best = 0.
    for n in range(1, 9):
        x = torch.cartesian_prod(*[torch.arange(2)]*n).view(-1, n); p = SOURCE.log_prob(x).exp()
        best = max([best] + [q for t, q in zip(map(tuple, x.tolist()), p.tolist()) if t not in known])
    assert heavy_hitting_beta(vocab, SOURCE) == pytest.approx(-math.log(best)/math.log(40))

def test_windows_score_every_token_once():
    tok = BPETokenizer.train(text(5000), 20); x = text(700, 2); n = len(tok.encode(x)); seen = []
    def model(ids): seen.append(ids); return torch.zeros(*ids.shape, 20)
    for context, stride in ((1, 1), (7, 1), (7, 3), (7, 7), (10_000, None)):
        for bos in (None, 0):
            r = end_to_end_loss(model, tok, x, context=context, stride=stride, bos=bos, batch_size=4)
            assert r['tokens'] == n - (bos is None) and r['nats_per_token'] == pytest.approx(math.log(20), rel=1e-5)
            assert r['chars'] == len(x) - (bos is None)*tok.lengths[tok.encode(x)[0]].item()
            assert r['nats_per_char']*r['chars'] == pytest.approx(r['nats_per_token']*r['tokens'])
    assert max(o.shape[1] for o in seen[:-2]) <= n

def test_windows_give_at_least_the_promised_context():
    got = []
    def model(ids):
        got.append(ids.shape[1]); logits = torch.zeros(*ids.shape, 2)
        return torch.where(torch.arange(ids.shape[1])[:, None] >= 3, logits, torch.tensor([100., -100.])) # hopeless with fewer than four tokens of past
    x = torch.ones(200, dtype=torch.long)
    r = end_to_end_loss(model, NGramTokenizer(1, 2), x, context=8, stride=4)
    assert r['nats_per_char']*r['chars'] < 3*200 + 200                           # only the text's first three pay
    with pytest.raises(ValueError): end_to_end_loss(model, NGramTokenizer(1, 2), x, context=8, stride=9)

def test_hugging_face_model_and_tokenizers():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel
    words = 'the cat sat on the mat and the dog sat on the cat. '*20
    tk = Tokenizer(models.BPE()); tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk.train_from_iterator([words], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    torch.manual_seed(0); n = tk.get_vocab_size()
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=n, n_positions=64, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.tensor(tk.encode(words).ids[:60]); short = tk.decode(ids.tolist())
    with torch.no_grad(): want = lm(ids[None], labels=ids[None]).loss.item()      # transformers' own mean over tokens 1..
    r = end_to_end_loss(lm, tk, short, context=64)
    assert r['nats_per_token'] == pytest.approx(want, rel=1e-4) and r['chars'] == len(short) - len(tk.decode(ids[:1].tolist()))
    tk.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match='another text'): end_to_end_loss(lm, tk, 'The Cat')
    assert end_to_end_loss(lm, tk, 'The Cat', lossy=True)['tokens'] > 0
    small = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=64, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match='knows 10'): end_to_end_loss(small, tk, words[:100])

def test_char_ngram_is_a_distribution():
    for k in (1, 2, 4):
        m = CharNGramModel(k, 3).fit(torch.randint(3, (300,), generator=torch.Generator().manual_seed(k)))
        x = torch.cartesian_prod(*[torch.arange(3)]*5)
        assert sum(math.exp(-m.nll(o)) for o in x) == pytest.approx(1, abs=1e-9)   # probabilities of all texts of length 5
    m = CharNGramModel(1, 2).fit(torch.tensor([0, 0, 0]))                          # Witten-Bell by hand: (3 + 1·½)/(3 + 1), and ½/4 for the other
    assert m.nll(torch.tensor([0])) == pytest.approx(-math.log(3.5/4)) and m.nll(torch.tensor([1])) == pytest.approx(-math.log(.5/4))

@pytest.mark.parametrize('train', [LZWTokenizer.train, BPETokenizer.train, NGramTokenizer.train])
def test_training_refuses_bad_input(train):
    x = text(500)
    for bad, size in ((x[:0], 8), (x, 1), (x.view(2, -1), 8), (torch.tensor([0, -1]), 8)):
        with pytest.raises(ValueError): train(bad, size)
    with pytest.raises(ValueError): train(x*5, 8, alphabet=2)                      # symbols outside of the alphabet
    for bad in (x.float(), x.tolist()):
        with pytest.raises(TypeError): train(bad, 8)

@pytest.mark.parametrize('name', TOKENIZERS)
def test_encoding_refuses_bad_input_and_is_deterministic(name):
    tok, x = TOKENIZERS[name](), text(300, 9)
    for bad in (x[:0], x[None], x + 1, x - 1):
        with pytest.raises(ValueError): tok.encode(bad)
        if bad.ndim == 1 and len(bad): 
            with pytest.raises(ValueError): tok.encode_batch(bad[None])
    for bad in (x.float(), x.tolist(), x.bool()):
        with pytest.raises(TypeError): tok.encode(bad)
    for bad in (torch.tensor([tok.vocab_size]), torch.tensor([-1]), x[:0]):
        with pytest.raises(ValueError): tok.decode(bad)
    for dtype in (torch.int32, torch.uint8): assert torch.equal(tok.encode(x.to(dtype)), tok.encode(x))
    assert torch.equal(TOKENIZERS[name]().encode(x), tok.encode(x))

@pytest.mark.parametrize('name', TOKENIZERS)
def test_saving(name, tmp_path):
    tok, x = TOKENIZERS[name](), text(300, 9); tok.save_pretrained(tmp_path)
    back = type(tok).from_pretrained(tmp_path)
    assert type(back) is type(tok) and back.vocab == tok.vocab and back.alphabet == tok.alphabet and torch.equal(back.encode(x), tok.encode(x))
    d = json.loads((tmp_path/'tokenizer.json').read_text()); d['type'] = 'Unheard'; (tmp_path/'tokenizer.json').write_text(json.dumps(d))
    with pytest.raises(ValueError): type(tok).from_pretrained(tmp_path)

def test_a_training_text_as_dictionary_does_not_generalize():
    x = text(500); tok = GreedyEncoder([(0,), (1,), tuple(x.tolist())])
    assert len(tok.encode(x)) == 1 and (tok.encode(text(5000, 1)) < 2).all()

def test_unigram_limit_is_what_counting_tokens_costs():
    tok, x = LZWTokenizer.train(text(10_000), 64), text(50_000, 1); t = tok.encode(x)
    m = UnigramTokenModel().fit(t, 64)
    assert m.nll(t)/len(x) == pytest.approx(unigram_limit(torch.bincount(t, minlength=64), tok.lengths))
    assert end_to_end_loss(m, tok, x)['nats_per_char'] == pytest.approx(m.nll(t)/len(x))
    assert bits_per_symbol(m.nll(t), len(x)) == pytest.approx(m.nll(t)/len(x)/math.log(2))
