"Bits: packing, the diffusion's posterior against enumeration, heads that sum to one, and text that is read once."
import itertools
import pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.codec import ImageTokenizer
from tokbook.image import (BernoulliDiffusion, BinaryARHead, BinaryQuantizer, BitTransformer, LatentQueryDecoder, LatentQueryEncoder,
                           LayerwiseTextFusion, layer_features, pack_bits, sample_bits, unpack_bits)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 99))
def test_packing(m, rows, seed):
    b = torch.randint(2, (rows, m), generator=torch.Generator().manual_seed(seed))
    words = pack_bits(b); assert words.shape == (rows, -(-m//64)) and torch.equal(unpack_bits(words, m), b)
    want = [sum(v << i for i, v in enumerate(r[:64])) for r in b.tolist()]
    assert [w % 2**64 for w in words[:, 0].tolist()] == want


@settings(max_examples=40, deadline=None)
@given(st.floats(.02, .98), st.floats(.05, 1.), st.floats(0, .95))
def test_posterior_is_bayes(prior, t, part):
    s, D = part*t, BernoulliDiffusion()
    if t - s < 1e-3: return
    at = lambda x, u: (1 - u)*x + u/2; of = lambda p, x: p if x else 1 - p; share = (t - s)/(1 - s)
    for xt in (0, 1):
        joint = {(a, b): of(prior, a)*of(at(a, s), b)*of((1 - share)*b + share/2, xt) for a, b in itertools.product((0, 1), repeat=2)}
        p0 = (joint[1, 0] + joint[1, 1])/sum(joint.values()); want = (joint[0, 1] + joint[1, 1])/sum(joint.values())
        got = D.q_posterior_prob(torch.tensor([xt]), torch.tensor([p0], dtype=torch.double), torch.tensor(t).double(), torch.tensor(s).double()).item()
        assert abs(got - want) < 1e-6


def test_flip_and_bit_are_the_same_statement():
    f, b = BernoulliDiffusion('flip'), BernoulliDiffusion('x0'); x0 = torch.randint(2, (9, 3, 4)); o = torch.randn(9, 3, 4)
    xt = f.q_sample(x0, .4, torch.Generator().manual_seed(0)); flipped = (xt != x0).float()
    torch.testing.assert_close(torch.nn.functional.binary_cross_entropy_with_logits(o, flipped),
                               torch.nn.functional.binary_cross_entropy_with_logits(f.to_x0(o, xt), x0.float()))
    assert torch.equal(b.to_x0(o, xt), o)


def test_guidance_conventions():
    D, seen = BernoulliDiffusion(), []
    model = lambda x, t, y: seen.append(y) or torch.full(x.shape, float(y))
    a = D.sample(model, (4, 5), 3, guidance=0., generator=torch.Generator().manual_seed(0), y=2.)
    assert set(seen) == {2.} and set(a.unique().tolist()) <= {0, 1}
    b = D.sample(model, (4, 5), 3, guidance=1., null=dict(y=0.), generator=torch.Generator().manual_seed(0), y=2.)
    c = D.sample(model, (4, 5), 3, generator=torch.Generator().manual_seed(0), y=4.); assert torch.equal(b, c) # (1 + w) 2 - w 0
    D.sample(lambda x, t: torch.zeros(x.shape), (2, 3), 2, temperature=0., generator=torch.Generator().manual_seed(0)) # no division by it


@pytest.mark.parametrize('kw', [dict(within='independent'), dict(within='grouped', group=2), dict(within='autoregressive'), dict(within='autoregressive', hidden=7), dict(within='grouped', group=3, hidden=8)])
def test_heads_sum_to_one_and_see_only_the_past(kw):
    torch.manual_seed(0); head = BinaryARHead(4, 6, **kw)
    for p in head.parameters(): torch.nn.init.normal_(p, std=.7)
    z = torch.cartesian_prod(*[torch.arange(2)]*6); h = torch.randn(4).expand(64, 4)
    assert abs(head.loss(h, z).neg().double().exp().sum().item() - 1) < 1e-5
    a = head.logits(h, z)
    for i in range(6):
        w = z.clone(); w[:, i] = 1 - w[:, i]; changed = (head.logits(h, w) - a).abs().amax(0) > 1e-6
        first = (i//head.group + 1)*head.group
        assert not changed[:first].any() # its own group and what is before


def test_causal_bits():
    torch.manual_seed(0); m = BitTransformer(4, 3, 5, causal=True, dim=16, heads=2, head=BinaryARHead(16, 3)).eval(); x = torch.randint(2, (2, 4, 3)); y = torch.tensor([1, 4])
    for p in m.parameters(): torch.nn.init.normal_(p, std=.2)
    w = x.clone(); w[:, 2] = 1 - w[:, 2]; a, b = m(x, labels=y), m(w, labels=y)
    torch.testing.assert_close(a[:, :3], b[:, :3]); assert (a[:, 3] - b[:, 3]).abs().max() > 1e-5
    s = [sample_bits(m, y, guidance=1., generator=torch.Generator().manual_seed(1)) for _ in '12']; assert torch.equal(*s) and s[0].shape == (2, 4, 3)
    assert torch.equal(sample_bits(m, y, temperature=0.), sample_bits(m, y, temperature=0.))


def test_any_size_in_the_tokenizer():
    torch.manual_seed(0)
    tok = ImageTokenizer(16, 3, 4, dim=12, latents=5, quantizer=BinaryQuantizer(12, 9), encoder=LatentQueryEncoder(3, 4, 5, 12, width=32), decoder=LatentQueryDecoder(3, 4, 5, 12, width=32))
    for s in (16, 32): b = tok.encode(torch.rand(2, 3, s, s)).values if s == 16 else tok.quantizer.encode(tok.encoder(torch.rand(2, 3, s, s))); assert b.shape == (2, 5, 9)
    assert tok.decode(b).shape == (2, 3, 16, 16) and tok.draw(tok.quantizer.decode(b), size=32).shape == (2, 3, 32, 32)
    tok.loss(torch.rand(2, 3, 16, 16))['loss'].backward()
    assert tok.bits_per_token == 9 and all(p.grad is not None for p in tok.parameters())


def test_real_language_models():
    tf = pytest.importorskip('transformers'); torch.manual_seed(0)
    for lm in (tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)),
               tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20))):
        f = layer_features(lm.eval(), torch.randint(20, (3, 5)), torch.ones(3, 5).long())
        g = LayerwiseTextFusion(4, 6, 16, 2, dim=16, heads=2)
        assert len(f) == 2 and not f[0].requires_grad
        BernoulliDiffusion().loss(g, torch.randint(2, (3, 4, 6)), text=g.read(f, torch.ones(3, 5))).backward()


def test_refusals():
    D = BernoulliDiffusion()
    for bad in (lambda: pack_bits(torch.tensor([3])), lambda: unpack_bits(torch.zeros(2).long(), 64), lambda: D.q_sample(torch.tensor([2]), .5), lambda: D.q_posterior_prob(torch.tensor([1]), torch.tensor([.5]), .2, .2),
                lambda: BinaryQuantizer(4, 3, tau=-1.), lambda: D.sample(lambda x, t: x, (1, 2), 0), lambda: BinaryARHead(4, 6, 'grouped', 5), lambda: LatentQueryEncoder(3, 4, 2, 8, width=8, heads=2)):
        with pytest.raises(ValueError): bad()
