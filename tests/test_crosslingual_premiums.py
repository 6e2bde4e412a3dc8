"""What a notebook is the wrong place for: random texts against brute force and Hugging Face, a sweep that is killed, joblib's backends, the reader's own tokenizers and files."""
import json, os, signal, subprocess, sys, time
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from tokbook.text.crosslingual_premiums import *
from tokbook.vocab import ByteTokenizer, train_tokenizer

words = st.lists(st.text('ab', min_size=1, max_size=9), min_size=1, max_size=25)

def bpe_by_hand(texts, vocab_size): # the textbook's algorithm; ties go to the smaller pair of ids, as in `tokenizers`
    letters = train_tokenizer(['x'], 256, split=None).hf.get_vocab(); names = {i: t for t, i in letters.items()}; ids = dict(letters)
    seqs, merges = [[ids[c] for c in t] for t in texts], []
    while len(ids) < vocab_size:
        pairs = Counter(p for s in seqs for p in zip(s, s[1:]))
        if not pairs: break
        (a, b), n = min(pairs.items(), key=lambda kv: (-kv[1], kv[0]))
        if n < 2: break
        new = ids.setdefault(names[a] + names[b], len(ids)); names[new] = names[a] + names[b]; merges.append((names[a], names[b]))
        for s in seqs:
            i = 0
            while i < len(s) - 1:
                if (s[i], s[i + 1]) == (a, b): s[i:i + 2] = [new]
                i += 1
    return merges

@settings(deadline=None, max_examples=40)
@given(st.lists(st.text('abcd', min_size=1, max_size=8), min_size=1, max_size=20), st.integers(257, 275))
def test_the_trainer_does_what_the_textbook_says(texts, V):
    got, want = NestedBPE.train(texts, V, 'none').merges, bpe_by_hand(texts, V)
    if not any(a == b for a, b in want): assert got == want # runs like aaa are counted with overlap here and there in ways of their own

@settings(deadline=None, max_examples=60)
@given(words, words, st.integers(256, 290), st.integers(256, 290))
def test_truncating_is_training_less(texts, others, V, W):
    "Two letters only: many merges, runs of equal letters, strings that come about in two ways."
    V, W = sorted((V, W)); big = NestedBPE.train(texts, W, 'none'); V = min(V, big.vocab_size)
    small = big.truncate(V)
    if V < big.vocab_size: assert small.merges == NestedBPE.train(texts, V, 'none').merges
    curve = ctc_curve(big, others)
    assert list(curve) == list(range(256, big.vocab_size + 1)) and curve[256] == sum(map(len, others))
    assert curve[V] == small.count(others) and curve[big.vocab_size] == big.count(others)
    if big.unique and V < big.vocab_size: assert nested_counts(big, others, [V])[V].sum() == curve[V]
    train = list(ctc_curve(big, texts).values()); assert train == sorted(train, reverse=True)

def test_a_string_made_by_two_merges():
    texts = ['aaaa aaa aaaaa aaaaaaa aaa']*3
    found = [t for t in (NestedBPE.train(['a'*n for n in g.integers(2, 12, 9)], 270, 'none') for g in map(np.random.default_rng, range(60))) if not t.unique]
    for t in found:
        for V in range(256, t.vocab_size): assert ctc_curve(t, texts, [V])[V] == t.truncate(V).count(texts)
    with pytest.raises(ValueError): nested_counts(found[0] if found else ByteTokenizer(), texts, [256])

@pytest.mark.parametrize('lang', ['en', 'my', 'zh'])
@pytest.mark.parametrize('split', ['whitespace', 'gpt2', 'none'])
def test_curves_on_real_text(lang, split):
    tok, judge = NestedBPE.train(cldr_lines(lang, 300, 0), 900, split), cldr_lines(lang, 60, 1)
    curve = ctc_curve(tok, judge)
    for V in (256, 257, 400, min(700, tok.vocab_size), tok.vocab_size): assert curve[V] == tok.truncate(V).count(judge)
    assert curve[256] == sum(len(t.encode()) for t in judge)
    for t in judge[:5]: assert tok.decode(tok.encode(t)) == t

@pytest.mark.parametrize('lang', ['en', 'th'])
def test_superbpe(lang):
    train, judge = cldr_lines(lang, 300, 0), cldr_lines(lang, 60, 1)
    plain = NestedBPE.train(train, 800)
    assert train_superbpe(train, 800, 1.).merges == plain.merges
    assert train_superbpe(train, 800, .8, stage2='whitespace').merges == plain.merges
    sup = train_superbpe(train, 800, .8)
    assert sup.merges[:len(sup.stage1.merges)] == sup.stage1.merges == plain.truncate(640).merges and sup.vocab_size == 800
    assert sup.count(judge) < plain.count(judge) and sup.count(train) < plain.count(train)
    assert all(sup.decode(sup.encode(t)) == t for t in judge)
    for bad in (0, 1.2): 
        with pytest.raises(ValueError): train_superbpe(train, 800, bad)

@settings(deadline=None, max_examples=60)
@given(st.floats(.2, 2), st.floats(0, .8), st.floats(1e3, 1e5), st.sampled_from(['linear', 'log']))
def test_law_recovers_and_inverts(b, floor, top, space):
    V = np.array([300, 500, 800, 1300, 2100, 3400]); y = top*((1 - floor)*(V/300.)**-b + floor)
    law = fit_vocab_law(V, y, space)
    assert np.allclose(law.predict(V), y, rtol=2e-3) and law.b > 0 and law.c >= 0 and law.r2 > .999
    for v in (350, 900, 3000):
        got, reached = law.vocab_for(float(law.predict(v))); assert reached and abs(law.predict(got) - law.predict(v)) <= .01*law.predict(v)
    assert law.vocab_for(law.c*.99 if law.c else 1e-9) == (3400, False) and law.vocab_for(2*top) == (300, False)

def test_dispersion_against_scipy_and_shuffled_labels():
    from scipy import stats
    g = np.random.default_rng(0); a, b = 100 + 2*g.standard_normal(40), 100 + 6*g.standard_normal(40)
    A, B = ({f'l{i}': float(x) for i, x in enumerate(v)} for v in (a, b)); d = dispersion(A, B)
    assert np.isclose(d['p_bf'], stats.levene(a, b, center='median').pvalue) and np.isclose(d['t'], stats.ttest_rel(a, b).statistic)
    assert np.isclose(d['f_ab'], a.var(ddof=1)/b.var(ddof=1)) and np.isclose(d['f_ab']*d['f_ba'], 1) and d['p_f'] < 1e-6
    assert np.isclose(dispersion(B, A)['p_f'], d['p_f']) and dispersion(A, A)['f_ab'] == 1
    assert dispersion(A, {**B, 'more': 1.})['left_out'] == ['more']
    ratios = []
    for _ in range(200):
        swap = g.random(40) < .5; x, y = np.where(swap, a, b), np.where(swap, b, a)
        ratios.append(dispersion(dict(zip(A, x)), dict(zip(A, y)))['f_ab'])
    assert np.mean(np.array(ratios) <= d['f_ab']) < .01 # no shuffle is as unequal as the truth
    with pytest.raises(ValueError): dispersion(A, {})

SWEEP = '''
import sys, time
from pathlib import Path
from tokbook.text.crosslingual_premiums import run_sweep
def slow(config):
    with open(Path(sys.argv[1])/'log', 'a') as f: f.write(f"{config['x']}\\n")
    time.sleep(.15); return config['x']**2
if __name__ == '__main__': print(run_sweep(slow, [dict(x=x) for x in range(12)], Path(sys.argv[1])/'out', n_jobs=1))
'''

def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path):
    (tmp_path/'sweep.py').write_text(SWEEP); cmd = [sys.executable, str(tmp_path/'sweep.py'), str(tmp_path)]
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE); out = tmp_path/'out'; t0 = time.time()
    while len(list(out.glob('*.json'))) < 3 and time.time() - t0 < 60: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    done = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob('*.json')}; assert 3 <= len(done) < 12
    for b, _ in done.values(): json.loads(b) # every file is whole
    (out/'0123456789abcdef.part').write_text('{"config": {"x"') # what dying in the middle of a write leaves
    said = subprocess.run(cmd, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [x**2 for x in range(12)]
    for name, was in done.items(): assert ((out/name).read_bytes(), (out/name).stat().st_mtime_ns) == was # not run again, not written again
    log = Counter((tmp_path/'log').read_text().split()); assert sum(log.values()) <= 13 and set(log.values()) <= {1, 2} # one job at most was cut off

def square(config): return config['x']**2

def test_backends(tmp_path):
    "One code for all of joblib's backends: its own, and one that somebody registers, as Dask and Ray do."
    import joblib
    from joblib._parallel_backends import SequentialBackend
    used = []
    class Cluster(SequentialBackend):
        def configure(self, *a, **k): used.append('configured'); return super().configure(*a, **k)
    joblib.register_parallel_backend('my-cluster', Cluster)
    jobs = [dict(x=x) for x in range(6)]; want = [x**2 for x in range(6)]
    for i, kw in enumerate((dict(n_jobs=1), dict(n_jobs=2, backend='threading'), dict(n_jobs=2, backend='loky'), dict(backend='my-cluster'))): assert run_sweep(square, jobs, tmp_path/str(i), **kw) == want
    assert used; used.clear()
    with joblib.parallel_config(backend='my-cluster'): assert run_sweep(square, jobs, tmp_path/'context') == want
    assert used and sorted(f.name for f in (tmp_path/'0').iterdir()) == sorted(f.name for f in (tmp_path/'2').iterdir())
    with pytest.raises(ValueError): run_sweep(square, jobs, tmp_path, errors='no')
    with pytest.raises(TypeError): sweep_key(square, dict(x=object()))

def test_premium_jobs_from_files(tmp_path):
    for l in ('en', 'de'): (tmp_path/f'{l}.txt').write_text('\n'.join(cldr_lines(l, 130, 0)) + '\n', encoding='utf-8')
    assert len(ParallelCorpus.from_files(tmp_path)) == 130 and ParallelCorpus.from_files({'x': tmp_path/'en.txt'}).langs == ['x']
    jobs = premium_grid(['en', 'de'], (300, 400), ('bpe', 'superbpe', 'unigram'), source=tmp_path, lines=(80, 20, 20))
    res = run_sweep(premium_job, jobs, tmp_path/'out'); assert run_sweep(premium_job, jobs, tmp_path/'out') == res
    for j, r in zip(jobs, res):
        assert all(r['at'][str(v)]['test'] == (r['test'][v - 256] if j['algorithm'] == 'bpe' else r['test'][str(v)]) for v in j['sizes']) and r['train_lines'] == 80
        if j['algorithm'] == 'bpe': assert r['test'][0] == r['bytes'] and 0 < r['at']['300']['similarity'] <= 1
    (tmp_path/'en.txt').write_text('changed\n'); changed = premium_grid(['en'], (300,), source=tmp_path, lines=(80, 20, 20))
    assert changed[0]['data'] != jobs[0]['data'] # another text is another job
    with pytest.raises(RuntimeError, match='1 lines'): run_sweep(premium_job, changed, tmp_path/'out')
    with pytest.raises(ValueError): premium_grid(['fr'], source=tmp_path)

def test_content_is_parallel_and_unseen():
    a, b = (cldr_lines(l, 50, seed=4) for l in ('en', 'fr'))
    digits = lambda t: sorted(c for c in t if c.isdigit()); same = sum(digits(x) == digits(y) for x, y in zip(a, b))
    assert same > 40 and cldr_lines('en', 50, seed=4) == a != cldr_lines('en', 50, seed=5)
    for l in CLDR_LANGUAGES: assert cldr_lines(l, 1)[0].strip() and language_name(l)[1] != 'Zzzz'
    assert len({language_name(l)[1] for l in CLDR_LANGUAGES}) >= 20 and len(CLDR_LANGUAGES) == len(set(CLDR_LANGUAGES)) == 72
    with pytest.raises(ValueError): wordfreq_lines('xx', 1)

def test_special_tokens_are_not_counted():
    from transformers import PreTrainedTokenizerFast
    from tokenizers.processors import TemplateProcessing
    tok = NestedBPE.train(cldr_lines('en', 100, 0), 400); pc = ParallelCorpus.from_babel(('en', 'de'), 10); plain = premium_report(tok, pc).ctc
    hf = NestedBPE.train(cldr_lines('en', 100, 0), 400).hf; hf.add_special_tokens(['<s>']); hf.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', hf.token_to_id('<s>'))])
    fast = PreTrainedTokenizerFast(tokenizer_object=hf, bos_token='<s>'); assert len(fast('x y').input_ids) > tok.count('x y')
    assert premium_report(fast, pc).ctc == plain and premium_report(hf, pc).ctc == plain
    small = NestedBPE(fast).truncate(300); assert small.count(pc['de']) == tok.truncate(300).count(pc['de']) == ctc_curve(fast, pc['de'], [300])[300]
    for bad in ({'en': tok}, 3):
        with pytest.raises((ValueError, TypeError)): premium_report(bad, pc)
