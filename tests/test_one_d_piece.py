"One-D-Piece: bits against a second implementation, searches against loops, and the cut against separate calls."
import pytest, torch
from hypothesis import given, settings, strategies as st
from tokbook.codec import Tokens, at_lengths, keep_mask, uniform_length
from tokbook.image.one_d_piece import *

SMALL = dict(size=8, channels=1, patch=4, latents=6, codebook_size=64, dim=6, width=16, depth=1, heads=2)
x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
def started(**kw):
    torch.manual_seed(0); tok = OneDPiece(**SMALL | kw); tok.train().loss(torch.rand(64, 1, 8, 8))
    return tok.eval()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 20).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))))
def test_bits_against_big_integers(case):
    bits, codes = case; n = len(codes); size = -(-n*bits//8)
    number = 0
    for c in codes: number = number << bits | c
    want = (number << 8*size - n*bits).to_bytes(size, 'big')
    blob = pack_indices(torch.tensor(codes), bits)
    assert blob == want and unpack_indices(blob, n, bits).tolist() == codes
    k = (n + 1)//2
    assert unpack_indices(blob[:-(-k*bits//8)], k, bits).tolist() == codes[:k] # any prefix of the file holds a prefix of the list


class Stub: # quality of picture i at length k is Q[i, k - 1], by construction
    num_tokens, vocab_size, bits_per_token = 6, 64, 6.
    def __init__(self, Q): self.Q = Q
    def encode(self, x, keep=None): return Tokens(torch.zeros(len(x), 6).long())
    def decode(self, t): return t.mask.sum(1).float().view(-1, 1, 1, 1)
    def metric(self, y, x): return self.Q[torch.arange(len(y)), y.flatten().long() - 1]

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([None, [1, 3, 6], [2], [4, 5]]))
def test_searches_against_loops(seed, ks):
    g = torch.Generator().manual_seed(seed); rising = torch.rand(9, 6, generator=g).sort(1).values; any_ = torch.rand(9, 6, generator=g)
    px, tries = torch.zeros(9, 1, 8, 8), ks or range(1, 7)
    loop = lambda Q: [next((k for k in tries if Q[i, k - 1] >= .6), 0) for i in range(9)]
    for Q in (rising, any_): s = Stub(Q); assert min_prefix_for(s, px, .6, s.metric, ks).tolist() == loop(Q)
    s = Stub(rising); assert min_prefix_for(s, px, .6, s.metric, ks, search='bisect').tolist() == loop(rising)


@pytest.mark.parametrize('tail', ['shared', 'each', 'none'])
def test_rules(tail):
    tok = started(tail=tail); tok.train(); kept = [float(tok.loss(x).get('kept', 6)) for _ in range(60)]
    assert all(k == 6 for k in kept) if tail == 'none' else len(set(kept)) > 3 and (tail == 'each' or set(kept) <= set(range(1, 7)))
    tok.eval(); assert 'kept' not in tok.loss(x)
    at = lambda k: tok.loss(x, length=lambda b, n, g: k)['loss'].item()
    assert at(6) == pytest.approx(tok.loss(x)['loss'].item(), abs=1e-7) and at(1) != at(6)


def test_per_sample_loss_is_the_mean_of_single_ones():
    tok = started(); ks = torch.tensor([1, 2, 3, 4, 5, 6, 3])
    both = tok.loss(x, length=lambda b, n, g: ks)['pixel']
    one = torch.stack([tok.loss(x[i:i + 1], length=lambda b, n, g: int(ks[i]))['pixel'] for i in range(7)]).mean()
    torch.testing.assert_close(both, one, atol=1e-6, rtol=0)


def test_a_codec_of_files_cut_anywhere():
    tok = started(); blobs = compress_images(tok, x) # 6 codes of 6 bits: 5 bytes
    assert {len(b) for b in blobs} == {5}
    cut = [b[:n] for b, n in zip(blobs, (1, 2, 3, 4, 5, 5, 3))]
    want = torch.cat([tok.decode(tok.encode(x[i:i + 1], min(8*len(b)//6, 6))) for i, b in enumerate(cut)])
    torch.testing.assert_close(expand_images(tok, cut), want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='budget'): compress_images(tok, x, 0)


def test_contribution_against_all_replacements():
    tok = started(codebook_size=4); c = tok.encode(x).values; base = tok.decode(c)
    want = [torch.stack([(tok.decode(c.index_fill(1, torch.tensor([j]), r)) - base).abs().mean((1, 2, 3)) for r in range(4)]).sum(0).mean()/3 for j in range(6)]
    got = token_contribution(tok, x, 60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, torch.stack(want), rtol=.12, atol=1e-4)
    assert (token_contribution(tok, x, 5) > 0).all() and token_contribution(started(codebook_size=2), x).shape == (6,)


def test_frozen_stays_frozen():
    tok = started().freeze(); tok.train()
    assert not tok.encoder.training and not tok.quantizer.training and tok.decoder.training
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    finetune_decoder(tok, torch.rand(64, 1, 8, 8), steps=3, batch=32, progress=False)
    assert {k.split('.')[0] for k, v in tok.state_dict().items() if not torch.equal(v, before[k])} == {'decoder'}
    with pytest.raises(ValueError, match='freeze'): finetune_decoder(started(), x, steps=1)


def test_lengths_are_uniform():
    g = torch.Generator().manual_seed(0); n = torch.bincount(torch.tensor([shared_length(9, 5, g) for _ in range(5000)]), minlength=6)[1:]
    assert (n - 1000).abs().max() < 120 and n.sum() == 5000
    assert tail_token_drop(torch.zeros(2, 5, 3), generator=torch.Generator().manual_seed(1))[1] == shared_length(2, 5, torch.Generator().manual_seed(1))
