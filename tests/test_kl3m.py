"""What a notebook is the wrong place for: random texts against `tokenizers`, brute force and transformers models."""
import math, os, re
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
from collections import Counter
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.data import documents
from tokbook.lm import GPT, HFCausalLM
from tokbook.text.kl3m import *
from tokbook.text.kl3m import _BYTE, _letters, _n_chars, _trie_pattern
from tokbook.vocab import ByteTokenizer, as_tokenizer, train_tokenizer

torch.set_num_threads(1)
some = settings(max_examples=40, deadline=None, derandomize=True)
DOCS = list(documents('train').values())[:25]
anything = st.text(st.one_of(st.sampled_from('ab .\n(1'), st.characters(codec='utf-8')), max_size=60)
def gen(seed): return torch.Generator().manual_seed(seed)

# ---- BPE ----
@some
@given(st.lists(st.text('abcé ', min_size=1, max_size=12), min_size=1, max_size=30), st.integers(256, 300), st.sampled_from([None, 2, 3, 4]))
def test_bpe_merges_are_those_of_tokenizers(texts, size, cap):
    import json
    from tokenizers import pre_tokenizers
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(p for t in texts for p, _ in pre.pre_tokenize_str(t))
    theirs = json.loads(train_tokenizer(texts, size, max_token_length=cap).hf.to_str())['model']['merges']
    assert bpe_merges(counts, size, lambda t: cap is None or len(t) <= cap) == [tuple(m) for m in theirs]

def test_no_token_is_longer_than_the_cap():
    texts = DOCS[:8] + ['été là où 東京都 は 日本 ' * 20]
    for cap in (1, 2, 3, 4):
        chars, raw = train_char_bpe(texts, 600, cap, specials=()), train_char_bpe(texts, 600, cap, unit='byte', specials=())
        assert max(len(t) for t in raw.table) == cap
        assert max(_n_chars(_s) for _s in chars.hf.get_vocab()) == cap
        for t in (chars, raw): assert all(t.round_trips(x) for x in texts[-2:])
    assert any(len(t.decode(errors='ignore')) == 3 and len(t) == 9 for t in train_char_bpe(['東京都。'*20], 300, 3).table if t)  # three characters of three bytes: one token

@some
@given(anything)
def test_every_text_round_trips(text):
    for t in TOKS.values(): assert t.round_trips(text)
LIST = ['Fed. R. Civ. P.', '__init__', '(iv)', '**', '  ', '    ', 'ab', ' href="', 'é½', *domain_tokens(['numbers'])]
TOKS = dict(plain=train_domain_bpe(DOCS, 2600), added=train_domain_bpe(DOCS, 2600, LIST, custom_mode='added'), pre=train_domain_bpe(DOCS, 2600, LIST), short=train_char_bpe(DOCS, 700))

# ---- custom tokens ----
def test_size_is_exact_and_every_listed_string_has_an_id():
    for size in (1700, 1999, 2048):
        for mode in ('added', 'pretokenizer'):
            t = train_domain_bpe(DOCS, size, LIST, custom_mode=mode)
            assert t.vocab_size == size and t.eos_id == t.hf.token_to_id('<|end|>')
            assert all(t.count(c) == 1 for c in LIST if not c.isspace())

def test_a_list_that_bpe_knows_takes_no_ids():
    plain = train_domain_bpe(DOCS, 700, specials=()); known = [b.decode() for b in plain.table[-40:] if b.isalpha()]
    t = train_domain_bpe(DOCS, 700, known, custom_mode='added', specials=())
    assert known and t.encode_batch(DOCS[:3]) == plain.encode_batch(DOCS[:3])

@some
@given(st.lists(st.text('ab1(. ', min_size=2, max_size=4), min_size=1, max_size=8, unique=True), st.text('ab1(. ', max_size=20))
def test_trie_is_the_longest_whole_word_match(strings, text): # against a plain alternation, longest first
    def one(s): return ('(?<!\\w)' if re.match(r'\w', s[0]) else '') + re.escape(s) + ('(?!\\w)' if re.match(r'\w', s[-1]) else '(?!\\S)' if s[-1] == ' ' else '')
    words, rest = [sorted((s for s in strings if bool(re.match(r'\w', s[0])) == w), key=lambda s: -len(s)) for w in (True, False)]
    plain = '|'.join(map(one, words + rest)); want = [m[0] for m in re.finditer(f'(?: (?:{plain})|(?:{plain}))', text)]
    assert [m[0] for m in re.finditer(_trie_pattern(strings), text)] == want

@pytest.mark.parametrize('inside', ['x(iv)y 10', 'see (iv).', ' 12 345 6789', '"__init__"', '__init__x', '…(iv)'])
def test_words_are_never_cut(inside):
    for p, (a, b) in zip(TOKS['pre'].pieces(inside), TOKS['pre'].spans(inside)):
        if p.strip() in LIST and p.strip()[0].isalnum(): assert not (a and inside[a].isalnum() and inside[a - 1].isalnum()) and not inside[b:b + 1].isalnum()

def test_padding():
    t = train_domain_bpe(DOCS[:5], 500)
    for m in (1, 64, 100): assert pad_vocab(t, m).vocab_size == -(-500//m)*m and pad_vocab(pad_vocab(t, m), m).hf.to_str() == pad_vocab(t, m).hf.to_str()
    assert pad_vocab(pad_vocab(t, power_of_two=True), power_of_two=True).vocab_size == 512
    p = pad_vocab(t, 1000); assert p.encode_batch(DOCS[:5]) == t.encode_batch(DOCS[:5]) and p.table[500:] == [None]*500 and p.eos_id == t.eos_id

def test_other_peoples_tokenizers():
    import tiktoken
    from transformers import PreTrainedTokenizerFast
    ours = TOKS['plain']; fast = PreTrainedTokenizerFast(tokenizer_object=ours.hf, bos_token='<|start|>')
    enc = tiktoken.Encoding('toy', pat_str=r'\s?\S+|\s', mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={'<|endoftext|>': 256})
    assert tokens_per_char(fast, DOCS[:3]) == tokens_per_char(ours, DOCS[:3]); assert term_counts(enc, ['ab']) == {'ab': 3}

# ---- noise ----
@some
@given(anything, st.floats(0, 1), st.integers(0, 999))
def test_noise_says_where_everything_went(text, rate, seed):
    n = ocr_noise(text, rate, gen(seed)); s = n.starts.tolist()
    assert s[0] == 0 and s[-1] == len(n.text) and s == sorted(s) and len(n.hit) == len(text)
    assert all(n.text[a:b] == c for a, b, c, h in zip(s, s[1:], text, n.hit) if not h)
    assert ocr_noise(text, rate, gen(seed)).text == n.text and ocr_noise(text, 0., gen(seed)).text == text

def test_noise_has_the_rate_it_is_asked_for():
    text = ''.join(DOCS)[:50_000]
    for rate in (.01, .1): assert ocr_noise(text, rate, gen(0), ['drop']).hit.float().mean().item() == pytest.approx(rate*np.mean([not c.isspace() for c in text]), rel=.1)

@some
@given(st.integers(0, 99))
def test_stability_is_symmetric_for_substitutions(seed):
    text = DOCS[3][:600]; n = ocr_noise(text, .1, gen(seed), ['confuse']); s = n.starts.tolist()
    other = ''.join(n.text[a:b] if b - a == 1 else c for a, b, c in zip(s, s[1:], text)); same = torch.arange(len(text) + 1); hit = torch.tensor([a != b for a, b in zip(text, other)])
    a, b = (boundary_stability(TOKS['plain'], x, Noisy(y, same, hit)) for x, y in ((text, other), (other, text)))
    assert all(a[k] == pytest.approx(b[k]) for k in ('jaccard', 'chance', 'corrected'))
    assert boundary_stability(ByteTokenizer(), text, Noisy(other, same, hit))['jaccard'] == 1.

# ---- transplant ----
def toy(kind, v):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
    torch.manual_seed(0)
    if kind == 'gpt2': return GPT2LMHeadModel(GPT2Config(vocab_size=v, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    if kind == 'gpt': return GPT(v, dim=32, depth=1, heads=2, tie=False)
    if kind == 'phi': return PhiForCausalLM(PhiConfig(vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)) # a head with a bias
    return LlamaForCausalLM(LlamaConfig(vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False))

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'phi', 'gpt'])
def test_transplant(kind):
    old, new = TOKS['plain'], train_tokenizer(DOCS, 900, specials=['<e>'], eos='<e>')
    lm = toy(kind, old.vocab_size); before = [p.clone() for p in lm.parameters()]; out = transplant_embeddings(lm, old, new)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.parameters()))  # the model itself is untouched
    w = lambda m: m.tok.weight if kind == 'gpt' else m.get_input_embeddings().weight
    h = lambda m: m.lm_head.weight if kind == 'gpt' else m.get_output_embeddings().weight
    assert w(out).shape == h(out).shape == (900, 32)
    assert (w(out) is h(out)) == (kind == 'gpt2')
    for i in (5, 300, 700, 899):
        ids = old.encode(new.table[i].decode()) if i > 256 else old_pieces(old, new)[i]
        torch.testing.assert_close(w(out)[i], w(lm)[ids].mean(0)); torch.testing.assert_close(h(out)[i], h(lm)[ids].mean(0))
    torch.testing.assert_close(w(out)[0], w(lm)[old.eos_id])
    x = torch.tensor([new.encode(DOCS[0])[:20]])
    assert out(x).logits.shape == (1, 20, 900) and torch.isfinite(out(x).logits).all()
    if kind != 'gpt': assert out.config.vocab_size == 900 and out.config.eos_token_id == 0 and isinstance(transplant_embeddings(HFCausalLM(lm), old, new), HFCausalLM)

@pytest.mark.parametrize('kind', ['gpt2', 'gpt'])
def test_a_transplanted_model_saves_and_loads(kind, tmp_path):
    new = train_tokenizer(DOCS, 500); out = transplant_embeddings(toy(kind, TOKS['plain'].vocab_size), TOKS['plain'], new).eval(); out.save_pretrained(tmp_path)
    back = type(out).from_pretrained(tmp_path).eval(); x = torch.tensor([new.encode('a text')])
    torch.testing.assert_close(back(x).logits, out(x).logits)

def test_the_same_vocabulary_in_another_order_changes_nothing():
    a = train_tokenizer(DOCS, 700); b = train_tokenizer(DOCS, 703, specials=['<x>', '<y>', '<z>']); lm = toy('llama', 700).eval(); new = transplant_embeddings(lm, a, b).eval()
    text = DOCS[1][:200]; x, y = torch.tensor([a.encode(text)]), torch.tensor([b.encode(text)])
    torch.testing.assert_close(new(y).logits[..., 3:], lm(x).logits)

def test_old_pieces_spell_every_token():
    old, new = ByteTokenizer(eos=True), train_tokenizer(['été 東京 ' * 30, *DOCS[:3]], 400)
    assert [old.decode_bytes(p) for p in old_pieces(old, new)] == new.table
    short = train_tokenizer(DOCS[:3], 300)
    assert [short.decode_bytes(p) for p in old_pieces(short, new)] == new.table  # also half a character

def test_bad_input():
    lm = toy('gpt', 2600)
    with pytest.raises(ValueError, match='how'): transplant_embeddings(lm, TOKS['plain'], TOKS['short'], 'median')
    with pytest.raises(TypeError, match='GPT or a transformers'): transplant_embeddings(torch.nn.Linear(2, 2), TOKS['plain'], TOKS['short'])
    with pytest.raises(ValueError, match='the model 100'): transplant_embeddings(toy('gpt', 100), TOKS['plain'], TOKS['short'])
    from tokenizers import Tokenizer, models
    with pytest.raises(ValueError): old_pieces(ByteTokenizer(), Tokenizer(models.WordPiece({'a': 0, '[UNK]': 1}, unk_token='[UNK]')))
    for bad in (dict(texts=[]), dict(texts=['']), dict(texts=['a'], draws=0)):
        with pytest.raises(ValueError): tokens_per_char(ByteTokenizer(), **bad)
    with pytest.raises(TypeError): tokens_per_char(3, ['a'])
    with pytest.raises(TypeError): tokens_per_char(ByteTokenizer(), [3])
