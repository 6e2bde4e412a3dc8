"Byte probabilities against enumeration: random BPEs and random laws of strings, closed forms, invariances, real tokenizer classes."
import math, re
from collections import Counter
from itertools import product
import pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.text.byte_probs import ByteEnsemble, ByteLM, TokenBytes, covers, healed_next_byte, naive_next_byte
from tokbook.vocab import train_tokenizer

some = settings(max_examples=25, deadline=None, derandomize=True)

def random_bpe(seed, letters=b'abc', merges=5): # merges of tokens that exist, none twice
    g, toks, out = torch.Generator().manual_seed(seed), [bytes([c]) for c in letters], []
    while len(out) < merges:
        a, b = (toks[torch.randint(len(toks), (1,), generator=g)] for _ in range(2))
        if a + b not in toks and len(a + b) < 6: out.append((a, b)); toks.append(a + b)
    return TokenBytes.from_merges(out, letters)

def law_model(tb, law): # the perfect model of a law of whole strings
    w = Counter()
    for (s, q), ids in zip(law.items(), tb.encode(list(law))):
        for k in range(len(ids) + 1): w[tuple(ids[:k])] += q
        w[(*ids, tb.eos_id)] += q
    def model(ids): return torch.tensor([math.log(w[(*ids, t)]/w[tuple(ids)]) if w[(*ids, t)] else -math.inf for t in range(len(tb.table))], dtype=torch.float64)
    return model

def random_law(seed, letters='abc', n=5): # lengths up to n, so that texts end
    g = torch.Generator().manual_seed(seed)
    strings = [''.join(c).encode() for k in range(1, n + 1) for c in product(letters, repeat=k)]
    p = torch.rand(len(strings), generator=g, dtype=torch.float64)**4
    return dict(zip(strings, (p/p.sum()).tolist()))

@some
@given(st.integers(0, 10**6))
def test_equals_the_law_of_strings(seed):
    tb, law = random_bpe(seed), random_law(seed)
    for valid in ('reachable', 'pairs'):
        lm = ByteLM(law_model(tb, law), tb, valid)
        for x in (b'', b'a', b'cb', b'aba', b'bcca'):
            past = sum(q for s, q in law.items() if s.startswith(x))
            want = torch.zeros(257, dtype=torch.float64); want[256] = law.get(x, 0)/past
            for c in b'abc': want[c] = sum(q for s, q in law.items() if s.startswith(x + bytes([c])))/past
            assert (lm.logprobs(lm.init(x)).exp() - want).abs().max() < 1e-12

@some
@given(st.integers(0, 10**6))
def test_pairs_decide_for_plain_bpe(seed):
    tb = random_bpe(seed, b'ab', 6)
    for x in (b'a', b'ab', b'bba', b'abab', b'aabba'):
        ids = tuple(tb.encode([x])[0]); assert torch.equal(tb.reachable(x, ids), tb.valid_next(ids[-1]))

def logits_model(v, seed): # a random law for each context
    def model(ids): return (2*torch.randn(v, generator=torch.Generator().manual_seed(hash((seed, *ids)) % 2**31), dtype=torch.float64)).log_softmax(0)
    return model

@some
@given(st.integers(0, 10**6), st.text('abc', min_size=1, max_size=7))
def test_chain_rule_and_incremental(seed, text):
    tb, x = random_bpe(seed), text.encode(); lm = ByteLM(logits_model(len(tb.table), seed), tb)
    state = lm.init(b'')
    for i, c in enumerate(x):
        p = lm.logprobs(state); assert abs(p.exp().sum() - 1) < 1e-12
        assert (p.exp() - lm.logprobs(lm.init(x[:i])).exp()).abs().max() < 1e-12
        new = lm.step(state, c); assert abs(state.nats - new.nats - p[c]) < 1e-9; state = new
    bits = lm.score(x); assert abs(bits[:-1].sum()*math.log(2) - state.nats) < 1e-9
    # independent: all token sequences whose pairs are valid, with their probabilities scaled up at each step
    total, stack = 0., [((), 0., b'')]
    while stack:
        ids, lp, at = stack.pop(); row = lm.model(list(ids))
        ok = torch.tensor([t is not None and tb.encode([at + t])[0] == [*ids, i] or i == tb.eos_id for i, t in enumerate(tb.table)])
        row = row.masked_fill(~ok, -math.inf).log_softmax(0)
        for i in ok.nonzero().flatten().tolist():
            if i == tb.eos_id: continue
            b = at + tb.table[i]
            if b.startswith(x): total += math.exp(lp + row[i])
            elif x.startswith(b): stack.append(((*ids, i), lp + row[i].item(), b))
    assert abs(math.log(total) + state.nats) < 1e-9

def test_independent_tokens_in_closed_form():
    "Tokens drawn independently among those that may follow: a recursion over the last token and the bytes it still has to say."
    tb = random_bpe(3, b'ab', 4); p = torch.rand(len(tb.table), generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(0)
    lm = ByteLM(lambda ids: p, tb, 'pairs'); x = b'abbaab'
    go = lambda last: p.masked_fill(~(tb.reachable(b'', ()) if last is None else tb.valid_next(last)), -math.inf).softmax(0)
    def prob(last, rest): # P(the text goes on with `rest` | last token)
        if not rest: return 1.
        row = go(last); return sum(row[i].item()*(1. if t.startswith(rest) else prob(i, rest[len(t):])) for i, t in enumerate(tb.table) if t and (t.startswith(rest) or rest.startswith(t)))
    assert abs(-lm.score(x)[:-1].sum()*math.log(2) - math.log(prob(None, x))) < 1e-9

def test_order_of_ids_and_unused_tokens_change_nothing():
    tb = random_bpe(1); lm = ByteLM(logits_model(len(tb.table), 5), tb); g = torch.Generator().manual_seed(0); want = lm.logprobs(lm.init(b'abca')).exp()
    perm = torch.randperm(len(tb.table), generator=g).tolist(); back = {p: i for i, p in enumerate(perm)} # new id -> old id
    table = [tb.table[i] for i in perm]
    moved = TokenBytes(table, lambda xs: [[back[i] for i in ids] for ids in tb.encode(xs)], back[tb.eos_id], text=False)
    other = ByteLM(lambda ids: lm.model([perm[i] for i in ids])[torch.tensor(perm)], moved)
    assert (other.logprobs(other.init(b'abca')).exp() - want).abs().max() < 1e-12
    more = TokenBytes([*tb.table, b'zz'], lambda xs: [tb.encode([x])[0] if b'z' not in x else [] for x in xs], tb.eos_id, text=False)
    third = ByteLM(lambda ids: torch.cat([lm.model(ids), torch.tensor([-math.inf], dtype=torch.float64)]), more)
    assert (third.logprobs(third.init(b'abca')).exp() - want).abs().max() < 1e-12

def test_bytes_as_tokens_need_no_covers():
    tb = TokenBytes.from_merges([], b'abc'); lm = ByteLM(logits_model(4, 0), tb); x = b'abcab'; row = lm.model(tb.encode([x])[0]).exp()
    for p in (lm.logprobs(lm.init(x)), naive_next_byte(lm, x), healed_next_byte(lm, x)): assert (p.exp()[[97, 98, 99, 256]] - row).abs().max() < 1e-12

def test_votes():
    law = random_law(7); a, b = (random_bpe(s) for s in (1, 2)); lms = [ByteLM(law_model(t, law), t) for t in (a, b)]
    rough = ByteLM(logits_model(len(a.table), 1), a); x = b'ab'
    v = ByteEnsemble([lms[0], rough], [.25, .75]); p = v.logprobs(v.init(x)).exp()
    assert (p - .25*lms[0].logprobs(lms[0].init(x)).exp() - .75*rough.logprobs(rough.init(x)).exp()).abs().max() < 1e-12
    s = v.step(v.init(x), 99); assert abs(s.nats + math.log(p[99])) < 1e-12
    assert (ByteEnsemble(lms).score(b'abc') - lms[0].score(b'abc')).abs().max() < 1e-9
    for w in ([.5], [1.5, -.5], [.5, .4]):
        with pytest.raises(ValueError, match='sum to 1'): ByteEnsemble(lms, w)

TEXT = 'the cat sat on the mat  and didn\'t sit  (naïve 東京 123)\n\n  return x\n'*30

@pytest.fixture(scope='module')
def gpt2_like(): return TokenBytes.from_tokenizer(train_tokenizer([TEXT], 340, specials=['<eos>'], eos='<eos>'))

@pytest.mark.parametrize('text', ['the  mat', "didn't  s", 'naï', '東京 1', 'x\n\n  re', '  ', ' (12'])
def test_patterns_that_look_ahead(gpt2_like, text):
    "The sum over bytes equals a sum over token sequences that real continuations attest, found without the library's search."
    tb = gpt2_like; lm = ByteLM(logits_model(len(tb.table), 2), tb, bos=[]); x = text.encode()
    tails = [b'', b'a', b' ', b'  ', b'  a', b'\n', b'\n\n', b'\na', b'7', b'(', b' (', b' 7', '☃'.encode()] + [bytes([c]) for c in range(0x80, 0xc0)] + [bytes(c) for n in (2, 3) for c in product((0x80, 0x8f, 0x9a, 0xa9, 0xbf), repeat=n)] # white space among them
    def ok(y):
        try: y.decode(); return True
        except UnicodeDecodeError: return False
    seen = {}
    def after(ids, at): # ids that some continuation attests
        if ids not in seen:
            can = torch.zeros(len(tb.table), dtype=torch.bool)
            asks = [(i, at + t + y) for i, t in enumerate(tb.table) if t for y in tails if ok(at + t + y)]
            for (i, _), got in zip(asks, tb.encode([y for _, y in asks])):
                if got[:len(ids) + 1] == [*ids, i]: can[i] = True
            can[tb.eos_id] = ok(at) and tb.encode([at])[0] == list(ids); seen[ids] = can
        return seen[ids]
    total, stack = 0., [((), 0., b'')]
    while stack:
        ids, lp, at = stack.pop(); row = lm.model(list(ids)).masked_fill(~after(ids, at), -math.inf).log_softmax(0)
        for i in (row > -math.inf).nonzero().flatten().tolist():
            if i == tb.eos_id: continue
            b = at + tb.table[i]
            if b.startswith(x): total += math.exp(lp + row[i])
            elif x.startswith(b): stack.append(((*ids, i), lp + row[i].item(), b))
    assert abs(lm.score(x)[:-1].sum()*math.log(2) + math.log(total)) < 1e-9
    assert abs(lm.logprobs(lm.init(x)).exp().sum() - 1) < 1e-9

def test_covers_are_covers(gpt2_like):
    got = {(*ids, t) for ids, lo, hi in covers(gpt2_like, b'the ma') for t in gpt2_like.order[lo:hi].tolist()}
    tail = b' ma' # after the last certain cut
    want = {(*gpt2_like.encode([tail[:i]])[0], t) for i in range(3) for t, b in enumerate(gpt2_like.table) if b and len(b) > 3 - i and b.startswith(tail[i:]) and b.isascii() and gpt2_like.encode([tail[:i] + b])[0] == [*gpt2_like.encode([tail[:i]])[0], t]}
    assert {c for c in got if sum(len(gpt2_like.table[t]) for t in c) > 3 and all(gpt2_like.table[t].isascii() for t in c)} >= want and want

@pytest.mark.parametrize('family', ['Llama', 'GPT2', 'Mistral'])
def test_transformers_models_with_a_cache(gpt2_like, family):
    import transformers
    torch.manual_seed(0); v = len(gpt2_like.table)
    small = dict(vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = dict(Llama=lambda: transformers.LlamaConfig(**small), GPT2=lambda: transformers.GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=2), Mistral=lambda: transformers.MistralConfig(sliding_window=4, **small))[family]()
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        lm = ByteLM(net, gpt2_like, bos=[0]); plain = ByteLM(lambda ids: net(torch.tensor([ids])).logits[0, -1].log_softmax(-1), gpt2_like, bos=[0])
        x = b'the cat sat  on'; a, b = lm.init(x), plain.init(x)
        for c in b' the m':
            a, b = lm.step(a, c), plain.step(b, c)
            assert (lm.logprobs(a).exp() - plain.logprobs(b).exp()).abs().max() < 1e-5
        fork = lm.step(a, ord('a')); lm.step(a, ord('e')) # another branch in between
        assert (lm.logprobs(lm.step(fork, ord('t'))).exp() - plain.logprobs(plain.step(plain.step(b, ord('a')), ord('t'))).exp()).abs().max() < 1e-5

def test_sentencepiece_like():
    import tokenizers as tk
    vocab = {'<unk>': 0, **{f'<0x{i:02X}>': i + 1 for i in range(256)}}
    for t in ['▁', *'theca ns', '▁t', 'he', '▁the', 'an', '▁c']: vocab.setdefault(t, len(vocab))
    sp = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=[('▁', 't'), ('h', 'e'), ('▁t', 'he'), ('a', 'n'), ('▁', 'c')], byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    sp.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend('▁'), tk.normalizers.Replace(' ', '▁')])
    sp.decoder = tk.decoders.Sequence([tk.decoders.Replace('▁', ' '), tk.decoders.ByteFallback(), tk.decoders.Fuse(), tk.decoders.Strip(' ', 1, 0)])
    tb = TokenBytes.from_tokenizer(sp); assert tb.lead
    lm = ByteLM(logits_model(len(vocab), 0), tb)
    for x in ('the ca', 'te', 'é the'.encode()[:1].decode(errors='ignore') + 't'):
        p = lm.logprobs(lm.init(x.encode())); assert abs(p.exp().sum() - 1) < 1e-9
    p = lm.logprobs(lm.init(b'th')) # '▁t' 'h' can only go on without 'e' right behind it; '▁the' covers
    assert p[ord('e')] > -math.inf
    with pytest.raises(ValueError, match='begins with a space'): tb.encode([b'the'])

def test_refusals():
    with pytest.raises(ValueError, match='covers need BPE'): TokenBytes.from_tokenizer(train_tokenizer([TEXT], 320, 'unigram'))
    tb = random_bpe(0); lm = ByteLM(logits_model(len(tb.table), 0), tb)
    with pytest.raises(ValueError, match='probability zero'): lm.init(b'z')
    with pytest.raises(ValueError, match='NaN'): ByteLM(lambda ids: torch.full((len(tb.table),), math.nan), tb).init(b'a')
    from tokbook.lm import GPT
    with pytest.raises(ValueError, match='logits'): ByteLM(GPT(3, dim=8, depth=1, heads=1), tb)
    with pytest.raises(ValueError, match='nothing for the model to read'): ByteLM(GPT(len(tb.table), dim=8, depth=1, heads=1), tb).init(b'')
