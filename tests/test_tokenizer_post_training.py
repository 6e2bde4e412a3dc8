"Post-training: the law of mixed sequences by enumeration, samplers against each other, freezing, SDEdit with a scheduler."
import itertools
from types import SimpleNamespace
import pytest, torch
from torch import nn
from tokbook.codec import ImageTokenizer
from tokbook.generator import ARGenerator
from tokbook.image.tokenizer_post_training import (ARSampler, HFSampler, PairedLatents, build_pairs, freeze_for_post_training, mix_generate, post_train, sdedit_mix, token_fingerprint)
from tokbook.lm import GPT
from tokbook.quantize import FSQ, VectorQuantize

rng = lambda s=0: torch.Generator().manual_seed(s)


@pytest.mark.parametrize('shared', [False, True])
def test_law_of_mixed_sequences(shared):
    "Every mixed sequence of three tokens has the probability that the definition gives it, also under a shared mask."
    torch.manual_seed(0); ar = ARGenerator(2, 3, classes=1, dim=8, heads=2)
    with torch.no_grad(): [p.normal_(std=.6, generator=rng()) for p in ar.parameters()]
    q, y, sigma = torch.tensor([1, 0, 1]), torch.tensor([0]), .4
    every = torch.tensor(list(itertools.product((0, 1), repeat=3))); p = []
    for s in every:
        logits = ar.eval()(s[None], y)[0, :, 0].log_softmax(-1).exp()                             # (3, 2): of each token given those before it
        p.append(torch.stack([(1 - sigma)*logits[i, s[i]] + sigma*(s[i] == q[i]) for i in range(3)]).prod().item())
    assert abs(sum(p) - 1) < 1e-5
    runs = [mix_generate(ARSampler(ar, y.expand(10)), q.expand(10, 3), sigma, rng(s), shared)[0] for s in range(500)]
    mixed = torch.cat([r[:1] for r in runs]) if shared else torch.cat(runs)                        # under a shared mask, one of each batch
    for s, want in zip(every, p):
        got = (mixed == s).all(1).float().mean().item(); assert abs(got - want) < 4.5*(want*(1 - want)/len(mixed))**.5


@pytest.mark.parametrize('guidance', [1., 2.5])
def test_samplers_agree_on_one_model(guidance):
    "The same network behind both samplers, with prompt in the place of class."
    torch.manual_seed(0); lm = GPT(20, dim=16, depth=2, heads=2); [p.data.normal_(std=.4, generator=rng()) for p in lm.parameters()]; lm.eval()
    q = torch.randint(8, (6, 10), generator=rng(1)); prompt, null = torch.arange(6)[:, None], torch.tensor([[19]])
    make = lambda: HFSampler(lm, prompt, 8, 10, guidance=guidance, null_prompt=null)
    def slowly(prefix, g):
        with torch.no_grad():
            see = lambda p: lm(torch.cat([p, prefix + 10], 1)).logits[:, -1, 10:18]
            c, u = see(prompt), see(null.expand(6, 1)); return torch.distributions.Categorical(logits=u + guidance*(c - u)).logits.argmax(1)
    for keep_all in (False, True):
        s = make(); s.options['temperature'] = 0.
        a, b = mix_generate(s, q, .6, rng(3), keep_all), mix_generate(slowly, q, .6, rng(3), keep_all)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    with pytest.raises(ValueError): HFSampler(lm, prompt, 8, -1)
    with pytest.raises(ValueError): HFSampler(lm, prompt, 8, 10, guidance=2., null_prompt=torch.zeros(1, 2).long())


def test_a_sampler_notices_another_prefix():
    torch.manual_seed(0); ar = ARGenerator(5, 8, classes=2, dim=16, heads=2); y = torch.tensor([0, 1]); s = ARSampler(ar, y)
    q = torch.randint(5, (2, 6), generator=rng())
    for p in (q[:, :4], q[:, :5], (q[:, :5] + 1) % 5, q[:, :2], q[:, :0]):
        torch.testing.assert_close(s.logits(p), ar.eval()(torch.cat([p, p.new_zeros(2, 1)], 1), y)[:, -1, 0].detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError): s.logits(q[:1, :2])
    with pytest.raises(ValueError): ARSampler(ARGenerator(5, 8, q=2))


def small(decoder='direct', quantizer=True): return ImageTokenizer(8, 1, 4, dim=4, width=16, depth=1, heads=2, decoder=decoder, quantizer=VectorQuantize(4, 16) if quantizer else None)

@pytest.mark.parametrize('decoder', ['direct', 'flow', 'conv'])
@pytest.mark.parametrize('quantizer', [True, False])
def test_only_the_decoder_moves(decoder, quantizer):
    torch.manual_seed(0); tok, x = small(decoder, quantizer), torch.rand(40, 1, 8, 8, generator=rng())
    inputs = torch.randint(16, (40, 4), generator=rng(1)) if quantizer else torch.randn(40, 4, 4, generator=rng(1))
    was, old = token_fingerprint(tok.eval(), x), [p.clone() for p in tok.decoder.parameters()]
    h = post_train(tok, PairedLatents(inputs, x), steps=30, lr=3e-3, batch=40, progress=False)
    assert token_fingerprint(tok, x) == was and any(not torch.equal(a, b) for a, b in zip(old, tok.decoder.parameters()))
    if decoder != 'flow': assert h.losses['loss'][-1] < h.losses['loss'][0]
    with torch.no_grad(): tok.encoder.out[1].bias[0] += 1e-6
    assert token_fingerprint(tok, x) != was


def test_refusals():
    tok, x = small(), torch.rand(6, 1, 8, 8)
    with pytest.raises(ValueError): post_train(tok, PairedLatents(torch.zeros(6, 5).long(), x), steps=1)
    with pytest.raises(ValueError): build_pairs(tok, ARGenerator(8, 4), x)
    with pytest.raises(ValueError): build_pairs(tok, ARGenerator(16, 5), x)
    tok.decoder = nn.Identity()
    with pytest.raises(ValueError): freeze_for_post_training(tok)
    shared = small(); shared.decoder.book = shared.quantizer
    with pytest.raises(ValueError): freeze_for_post_training(shared)


class Scheduler: # the four things of a diffusers scheduler, for straight lines: x_t = (1 - t/1000) x + t/1000 noise
    def set_timesteps(self, n): self.timesteps = torch.linspace(1000, 1000/n, n)
    def add_noise(self, x, noise, t): t = t.view(-1, *[1]*(x.ndim - 1))/1000; return (1 - t)*x + t*noise
    def step(self, v, t, x): return SimpleNamespace(prev_sample=x - v/len(self.timesteps))

@pytest.mark.parametrize('sigma', [1., .75, .5, 0.])
def test_sdedit_with_a_scheduler(sigma):
    z = torch.randn(50, 3, generator=rng()); v = lambda x, t: x*.3 + (t/1000 if t.ndim == 0 or t.max() > 1 else t)[..., None]*.1
    a = sdedit_mix(lambda x, t: x*.3, z, sigma, 20, rng(1)); b = sdedit_mix(lambda x, t: x*.3, z, sigma, 20, rng(1), scheduler=Scheduler())
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if sigma == 1: assert torch.equal(a, z)
