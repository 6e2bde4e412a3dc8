"CharBench: cuts of several kinds of tokenizers, ranking with real model classes, statistics against scipy."
import numpy as np, pandas as pd, pytest, torch
from scipy.stats import pearsonr
from tokbook.data import word_list
from tokbook.lm import GPT
from tokbook.text.charbench import (FEATURES, LOCATION, PROMPT, TASKS, CharItem, answer_by_ranking, char_answer, counting_bias, error_overlap, feature_correlations, make_charbench,
                                    partial_effects, score_answers, token_features, word_spans)
from tokbook.vocab import ByteTokenizer, train_tokenizer

WORDS = [w for w, _ in word_list('en', 6000, '[a-z]{4,10}')]

def test_sentencepiece_marks_are_not_letters():
    import tokenizers as tk
    vocab = {'<unk>': 0, '▁': 1, **{c: i + 2 for i, c in enumerate('abcdef')}, 'ab': 8, '▁ab': 9}
    sp = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=[('a', 'b')], unk_token='<unk>')) # the mark stays alone
    sp.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend('▁'), tk.normalizers.Replace(' ', '▁')])
    assert sp.encode('abc').tokens == ['▁', 'ab', 'c'] # three pieces, two of them of the word
    assert word_spans(sp, 'abc') == [(0, 2), (2, 3)]
    item = CharItem('abc', 'c', 'find_first_occurrence', 2); f = token_features(item, word_spans(sp, 'abc'))
    assert f['number_of_tokens'] == 2 and f['target_token_length'] == 1

@pytest.mark.parametrize('word', ['plain', 'naïve', 'Straße', '東京都市', 'A'])
@pytest.mark.parametrize('template', [None, "in the string '{word}'?", 'the {word}', '{word}s'])
def test_spans_tile(word, template):
    tok = train_tokenizer(WORDS[:3000] + ["the string 'naïve'?"]*50, 500)
    for t in (tok, ByteTokenizer()):
        s = word_spans(t, word, template)
        assert s[0][0] == 0 and s[-1][1] == len(word) and all(a[1] == b[0] for a, b in zip(s, s[1:])) and all(b > a for a, b in s)
    assert word_spans(ByteTokenizer(), word) == [(i, i + 1) for i in range(len(word))]

def test_cells_are_exact_and_disjoint():
    items = make_charbench(WORDS, range(5, 9), 7, seed=3)
    count = pd.DataFrame([dict(task=i.task, n=len(i.word)) for i in items]).value_counts()
    assert len(count) == 16 and (count == 7).all() and len({i.word for i in items}) == len(items)
    for i in items: assert i.answer == char_answer(i.task, i.word, i.char) and (i.char is None or i.char in i.word)
    assert make_charbench(WORDS, range(5, 9), 7, seed=3) == items != make_charbench(WORDS, range(5, 9), 7, seed=4)

def table(seed=0, n=300):
    g = np.random.default_rng(seed); items = make_charbench(WORDS, range(4, 11), 12, seed=seed)
    spans = []
    for i in items: # random cuts
        at = sorted({0, len(i.word), *g.integers(1, len(i.word), 3).tolist()}); spans.append(list(zip(at, at[1:])))
    answers = [i.answer if g.random() < .9 - .06*i.answer else int(g.integers(0, 9)) for i in items]
    return items, answers, spans

def test_correlations_equal_scipy_and_ignore_order():
    items, answers, spans = table(); df = score_answers(items, answers, spans); c = feature_correlations(df, draws=50).set_index(['task', 'feature'])
    for t in TASKS:
        d = df[df.task == t]
        for f in FEATURES:
            if f == 'target_token_length' and t not in LOCATION: assert np.isnan(c.r[t, f]); continue
            assert abs(c.r[t, f] - pearsonr(d[f].astype(float), d.correct)[0]) < 1e-12 and c.low[t, f] <= c.r[t, f] <= c.high[t, f]
    shuffled = feature_correlations(df.sample(frac=1, random_state=1), draws=0).set_index(['task', 'feature'])
    assert np.allclose(shuffled.r.reindex(c.index), c.r, equal_nan=True)

def test_partial_effects_find_the_cause():
    "Success depends on one feature only, and a second one that goes with it has a correlation but no effect."
    g = np.random.default_rng(0); n = 4000; a = g.normal(size=n); b = .8*a + .6*g.normal(size=n)
    df = pd.DataFrame(dict(a=a, b=b, correct=(g.random(n) < 1/(1 + np.exp(-1.5*a))).astype(int)))
    assert np.corrcoef(df.b, df.correct)[0, 1] > .3
    p = partial_effects(df, ['a', 'b'], draws=40).set_index('feature')
    assert abs(p.effect['a'] - 1.5*df.a.std()) < .15 and p.low['b'] < 0 < p.high['b']

def test_overlap_by_sets():
    items, answers, spans = table(1); other = [a if k % 3 else -1 for k, a in enumerate(answers)]
    df = pd.concat([score_answers(items, answers, spans, 'a'), score_answers(items, other, spans, 'b')])
    for r in error_overlap(df).itertuples():
        A, B = ({i.word for i, v in zip(items, x) if i.task == r.task and v != i.answer} for x in (answers, other))
        assert r.jaccard == len(A & B)/len(A | B)
    bias = counting_bias(df[df.model == 'b']).set_index('task')
    d = [(-1 if not k % 3 else a) - i.answer for k, (i, a) in enumerate(zip(items, answers)) if i.task == TASKS[0] and other[k] != i.answer]
    assert abs(bias['mean'][TASKS[0]] - np.mean(d)) < 1e-9 and bias['count'][TASKS[0]] == len(d)

@pytest.mark.parametrize('family', ['GPT2', 'Llama', 'ours'])
def test_ranking_with_a_shared_prefix_equals_full_sequences(family):
    import transformers
    tok = train_tokenizer(WORDS[:2000] + [PROMPT.format(question='How often?')]*9, 420); torch.manual_seed(0); v = tok.vocab_size
    lm = dict(GPT2=lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=2)), ours=lambda: GPT(v, dim=32, depth=2, heads=2),
              Llama=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)))[family]().eval()
    items = make_charbench(WORDS, [4, 7, 10], 1, seed=5)
    got = answer_by_ranking(lm, tok, items, batch=5)
    with torch.no_grad():
        for x, a in zip(items, got):
            score = []
            for c in range(11):
                ids = torch.tensor([tok.encode(PROMPT.format(question=x.question) + f'{c}\n')])
                score.append(lm(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().item())
            assert max(score) - score[a] < 1e-3
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    assert answer_by_ranking(lm, tok, [items[i] for i in order], batch=4) == [got[i] for i in order]
