"What a notebook is the wrong place for: random words against brute force, packed against padded in float64, causality on random batches, plain models as special cases, Hugging Face backbones, saving."
import copy, math, os
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
from itertools import product
import pytest, torch, torch.nn.functional as F
from collections import Counter
from hypothesis import given, settings, strategies as st
from tokbook.lm import GPT, HFCausalLM
from tokbook.text.learn_your_tokens import *
from tokbook.vocab import ByteTokenizer, train_tokenizer

def model(n_units=5, prefix=2, max_units=4, seed=0, scale=5, dim=16, **kw):
    torch.manual_seed(seed)
    m = WordPooledLM(GPT(1, dim, 2, 2, max_len=64, **kw), n_units, prefix=prefix, enc_depth=1, dec_depth=2, heads=2, max_units=max_units)
    with torch.no_grad(): [p.mul_(scale) for p in m.parameters() if p.ndim > 1]
    return m.double().eval()

word = lambda n=5, hi=4: st.lists(st.integers(0, n - 1), min_size=1, max_size=hi)
rows = lambda **kw: st.lists(st.lists(word(**kw), min_size=1, max_size=5), min_size=1, max_size=3)
flat = lambda z: z.nan_to_num(neginf=0.)
LM = model()

@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60), st.one_of(st.none(), st.integers(1, 9)))
def test_split_loses_nothing(text, n):
    try: raw = text.encode()
    except UnicodeEncodeError: return                        # lone surrogates are no text
    ws = split_words(text, max_units=n)
    assert b''.join(ws) == raw and all(ws) and all(n is None or len(w) <= n for w in ws)
    if n is None or n >= 4: [w.decode() for w in ws]          # never in the middle of a character

@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40))
def test_split_takes_any_bytes(raw): assert b''.join(split_words(raw, max_units=5)) == raw

def test_words_only_end_when_something_else_follows():
    "Appending text changes the last word at most, which is what generating until a word is complete rests on."
    text = 'One bank, two  bankers\'\nnaïve №5 "x_1"'
    for i in range(1, len(text)): a, b = split_words(text[:i]), split_words(text); assert a[:-1] == b[:len(a) - 1]

@settings(deadline=None, max_examples=25)
@given(rows())
def test_packed_equals_padded(r):
    b = word_batch(r)
    with torch.no_grad():
        z = LM.word_logits(b)[0]
        for kw in (dict(distinct=False), dict(impl='padded'), dict(impl='padded', distinct=False)): torch.testing.assert_close(LM.word_logits(b, **kw)[0], z, rtol=0, atol=1e-11)
        n = b.lengths[b.lengths > 0]; q = LM.pooler(b.units, n)
        for width in (int(n.max()), 4): torch.testing.assert_close(LM.pooler(b.units, n, impl='padded', width=width), q, rtol=0, atol=1e-12)

def test_gradients_of_distinct_words_add_up():
    b = word_batch([[[1, 2], [3], [1, 2], [1, 2], [0, 0, 0]]]); grads = []
    for kw in (dict(), dict(distinct=False), dict(impl='padded', distinct=False)):
        m = copy.deepcopy(LM); z, ids, _ = m.word_logits(b, **kw); F.cross_entropy(z, ids).backward(); grads.append([p.grad for p in m.parameters()])
    for other in grads[1:]:
        for a, c in zip(grads[0], other):
            assert (a is None) == (c is None)
            if a is not None: torch.testing.assert_close(a, c, rtol=0, atol=1e-12)

@settings(deadline=None, max_examples=15)
@given(rows(), st.sampled_from(['left', 'right']))
def test_a_row_does_not_depend_on_its_batch(r, pad):
    with torch.no_grad():
        b = word_batch(r, pad=pad); lp, hit = LM.score(b)
        for i, row in enumerate(r):
            one, h = LM.score(word_batch([row])); m = b.lengths[i] > 0
            torch.testing.assert_close(lp[i][m], one[0], rtol=0, atol=1e-11); assert torch.equal(hit[i][m], h[0]) and not lp[i][~m].any()

@settings(deadline=None, max_examples=10)
@given(st.lists(word(), min_size=2, max_size=5))
def test_causality_by_jacobian(r):
    b = word_batch([r]); delta = torch.zeros(len(b.units), LM.dim, dtype=torch.float64, requires_grad=True)
    hook = LM.pooler.emb.register_forward_hook(lambda m, i, o: o + delta)
    try: z, _, w = LM.word_logits(b, distinct=False)
    finally: hook.remove()
    _, _, place = LM.unpooler.targets(b.units, b.lengths[0])
    of, at = torch.arange(len(r)).repeat_interleave(b.lengths[0]), torch.cat([torch.arange(len(x)) for x in r])
    direction = torch.randn(z.shape[1] - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k, y in enumerate(z[:, :-1]@direction):
        g = torch.autograd.grad(y, delta, retain_graph=True, allow_unused=True)[0]; g = torch.zeros_like(delta) if g is None else g
        assert torch.equal(g.norm(dim=1) > 0, (of < w[k]) | ((of == w[k]) & (at < place[k])))

@pytest.mark.parametrize('prefix,max_units,rope', [(1, 3, False), (2, 3, True), (3, 2, False)])
def test_all_texts_of_two_words_sum_to_one(prefix, max_units, rope):
    m = model(n_units=2 if max_units == 3 else 3, prefix=prefix, max_units=max_units, rope=rope, scale=8)
    words = [list(w) for n in range(1, max_units + 1) for w in product(range(m.n_units), repeat=n)]
    with torch.no_grad(): lp, _ = m.score(word_batch([[a, b] for a in words for b in words]))
    assert abs(lp.sum(1).exp().sum().item() - 1) < 1e-10
    first = lp[::len(words), 0].exp(); assert abs(first.sum().item() - 1) < 1e-10 and first.std() > 1e-4

@settings(deadline=None, max_examples=12)
@given(st.lists(st.lists(word(), max_size=4), min_size=1, max_size=3), st.integers(0, 10**6))
def test_generation_with_and_without_caches(r, seed):
    for t in (0., 1.):
        draw = lambda c: LM.generate(r, 3, temperature=t, generator=torch.Generator().manual_seed(seed), use_cache=c)
        assert draw(True) == draw(False)
    new = LM.generate(r, 3)
    for row, n in zip(r, new): assert LM.score(word_batch([row + n]))[1][0, len(row):].all()
    for i, row in enumerate(r): assert LM.generate([row], 3)[0] == new[i]

def test_one_step_of_the_language_model_per_word():
    seen = []; hook = LM.backbone.body.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    try: LM.generate([[[1], [2, 3]]], 4)
    finally: hook.remove()
    assert seen == [3*LM.prefix] + [LM.prefix]*3              # the start and two words; then p steps a word

def test_a_long_word_ends_by_force():
    m = model(); b = word_batch([[[0, 1, 2, 3], [1]]]); ids, w, _ = m.unpooler.targets(b.units, b.lengths[0])
    assert ids.tolist() == [0, 1, 2, 3, 1, m.n_units] and w.tolist() == [0]*4 + [1]*2
    z = m.word_logits(b)[0]; assert z[0, -1] == z[4, -1] == -math.inf and z[[1, 2, 3, 5]].isfinite().all()

class Copy(torch.nn.Module): # an encoder and decoder that only pass on
    def forward(self, x, **kw): return x

def test_reduces_to_a_plain_language_model():
    "p = 1, one unit a word, nothing in the encoder or decoder: a GPT over units, logit for logit."
    torch.manual_seed(0); gpt = GPT(6, 16, 2, 2, max_len=32, rope=True).double().eval()
    m = WordPooledLM(copy.deepcopy(gpt), 5, prefix=1, enc_depth=1, dec_depth=1, heads=2, max_units=1).double().eval()
    m.pooler.body = m.unpooler.body = Copy()
    with torch.no_grad():
        for x in (m.pooler.pos, m.unpooler.pos, m.pooler.slots): x.zero_()
        m.pooler.forward = lambda units, lengths, **kw: m.pooler.emb(units)[:, None]      # the unit's own vector
        m.pooler.emb.weight.copy_(gpt.tok.weight[:5]); m.start.copy_(gpt.tok.weight[5:]); m.unpooler.head.weight.copy_(gpt.tok.weight)
        x = torch.randint(5, (2, 9)); z = m.word_logits(word_batch([[[u] for u in r] for r in x.tolist()]))[0].reshape(2, 9, 6)
        want = gpt(torch.cat([torch.full((2, 1), 5), x[:, :-1]], 1)).logits
        torch.testing.assert_close(z[..., :5], want[..., :5], rtol=0, atol=1e-12)

def llama(dim=16):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0); return LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=dim, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)).eval()
def gpt2(dim=16):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0); return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=256, n_embd=dim, n_layer=2, n_head=2)).eval()

@pytest.mark.parametrize('make', [llama, gpt2])
def test_hugging_face_backbones(make):
    m = WordPooledLM(make(), prefix=2, enc_depth=1, dec_depth=1, heads=2).eval(); assert isinstance(m.backbone, HFCausalLM)
    r = [split_words('to be or not'), split_words('that is the question')]
    with torch.no_grad():
        lp, _ = m.score(b := word_batch(r, pad='left')); alone, _ = m.score(word_batch(r[:1])); torch.testing.assert_close(lp[0][b.lengths[0] > 0], alone[0], atol=1e-4, rtol=0)
    assert m.generate(r, 3) == m.generate(r, 3, use_cache=False)
    m.train(); m(b)['loss'].backward(); assert m.pooler.slots.grad.norm() > 0 and m.start.grad.norm() > 0
    with pytest.raises(ValueError): WordPooledLM(make(), dim=32)

def test_scores_are_the_models_own():
    "The window that holds the whole text gives the losses of one plain forward pass; bits per byte of the uniform model are eight."
    text = 'a small text, with a few words in it.'; lm = GPT(256, 16, 1, 2, max_len=256).eval(); ws = split_words(text)
    with torch.no_grad(): [p.zero_() for p in lm.parameters()]
    r = next_word_accuracy(score_words(lm, text, ByteTokenizer(), context=1000), Counter(ws)); assert abs(r['bits_per_byte'] - 8) < 1e-5
    assert r['words'] == len(ws) - 1 == sum(n for n, *_ in r['buckets'].values())
    torch.manual_seed(0); lm = GPT(256, 16, 1, 2, max_len=256).eval(); ids = torch.tensor([list(text.encode())])
    with torch.no_grad(): nll = F.cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:], reduction='none')
    s = score_words(lm, text, ByteTokenizer(), context=1000); assert abs(s.nll.sum().item() - nll[len(ws[0]) - 1:].sum().item()) < 1e-3
    p = model(256, max_units=16); one = p.score(word_batch([ws]))[0][0, 1:]; torch.testing.assert_close(score_words(p, text, context=1000).nll.double(), -one.detach(), atol=1e-4, rtol=0)

def test_one_pass_equals_generating():
    "Hits of a subword model, other spellings included, are what generating until a word is complete writes."
    text = 'the banker sat on the bank by the river and the banker sat. '*3; ws = split_words(text)[:24]
    tok = train_tokenizer([text], 262, min_frequency=1)
    torch.manual_seed(0); lm = GPT(tok.vocab_size, 32, 2, 2, max_len=512, rope=True); ids = torch.tensor([sum((tok.encode(w.decode()) for w in split_words(text)), [])]); opt = torch.optim.AdamW(lm.parameters(), 5e-3)
    for _ in range(40): loss = F.cross_entropy(lm(ids[:, :-1]).logits[0], ids[0, 1:]); opt.zero_grad(); loss.backward(); opt.step()
    lm.eval(); s = score_words(lm, ws, tok, context=10_000)
    slow = [spell_word(lm, torch.tensor(sum((tok.encode(w.decode()) for w in ws[:i]), [])), tok.table) == ws[i] for i in range(1, len(ws))]
    assert s.hit.bool().tolist() == slow and 0 < s.hit.mean() < 1 and (s.begun >= s.hit).all()

def test_begun_is_not_complete():
    "A model that always goes on with 'er' after 'bank' has not written 'bank'."
    follow = dict(zip(b'bank', b'anke')); follow |= {ord(' '): ord('b'), ord('e'): ord('r'), ord('r'): ord('.'), ord('.'): ord(' ')}
    class Lm(GPT):
        def forward(self, ids=None, **kw):
            o = super().forward(ids, **kw); o.logits = F.one_hot(torch.tensor([[follow.get(int(i), 0) for i in r] for r in ids]), 256).float()*20; return o
    s = score_words(Lm(256, 8, 1, 2, max_len=64).eval(), [b'.', b' bank', b' is', b'.', b' banker', b'.'], ByteTokenizer(), context=100)
    assert s.hit.tolist() == [0, 0, 0, 1, 1] and s.begun.tolist() == [1, 0, 0, 1, 1]

def test_windows_give_every_word_its_context():
    from tokbook.text.learn_your_tokens import _windows
    ws = split_words('word by word the window moves over the text, and no word is scored twice or left out. '*5); at = [0]
    for w in ws: at.append(at[-1] + len(w))
    for context in (2, 20, 64, 10_000):
        got = [k for a, i, j in _windows(ws, context) for k in range(i, j)]; assert got == list(range(1, len(ws)))
        for a, i, j in _windows(ws, context):
            longest = max(map(len, ws)); assert a < i
            for k in range(i, j): assert at[k] - at[a] <= context + longest and (a == 0 or at[k] - at[a] >= context//2 - longest)

def test_compiles_saves_and_repeats(tmp_path):
    torch.manual_seed(0); m = WordPooledLM(GPT(1, 16, 1, 2, max_len=64), prefix=2, enc_depth=1, dec_depth=1, heads=2).eval(); b = word_batch([split_words('saved and loaded')])
    m.save_pretrained(tmp_path); again = WordPooledLM.from_pretrained(tmp_path, backbone=GPT(1, 16, 1, 2, max_len=64)).eval()
    with torch.no_grad(): assert torch.equal(m.word_logits(b)[0], again.word_logits(b)[0])
    with torch.autocast('cpu', torch.bfloat16): assert m(b)['loss'].dtype == torch.float32

def test_what_is_refused():
    for bad in (lambda: LM.score(word_batch([[[5]]])), lambda: LM.score(word_batch([[[1]*5]])), lambda: word_batch([[[]]]), lambda: word_batch([[[1]]], pad='middle'), lambda: split_words('a', max_units=0),
                lambda: split_words('ab', lambda s: ['a']), lambda: LM.generate([[[1]]], 1, temperature=-1), lambda: score_words(LM, 'a b', ByteTokenizer()), lambda: WordUnpooler(prefix=0), lambda: WordPooler(dim=0)):
        with pytest.raises(ValueError): bad()
    for bad in (lambda: split_words(None), lambda: WordPooledLM(3), lambda: LM.pooler(torch.ones(2), torch.tensor([2]))):
        with pytest.raises(TypeError): bad()
