"""The contract of every quantizer that `tokbook.quantize` exports, found by itself, and comparison with independent implementations.

A new chapter's quantizer is picked up when it subclasses `Quantizer` and its `example(dim)` returns a small instance that can encode."""
import inspect, itertools
import numpy as np, pytest, torch, torch.nn.functional as F
import tokbook.quantize as quantize
from tokbook.lazy import exported_names
from tokbook.quantize.vq_survey import (BSQ, FSQ, LFQ, LAYOUTS, AdditiveQuantize, ChannelFirst, Codebook, CodeUsage, NotFitted, ProductQuantize, Quantized, Quantizer, ResidualVQ,
                                        VectorQuantize, bit_entropy, bits_to_index, codes_to_ids, codebook_stats, extend_vocab, icm, ids_to_codes, index_to_bits, kmeans, reset_dead_codes_, rotate_to)

def subclasses(): return sorted({o for n in exported_names('tokbook.quantize') if inspect.isclass(o := getattr(quantize, n)) and issubclass(o, Quantizer) and o is not Quantizer}, key=lambda c: c.__name__)

VARIANTS = {  # the same contract for the options that change the path through a class
    'VQ cosine': lambda: VectorQuantize(8, 16, cosine=True), 'VQ narrow': lambda: VectorQuantize(8, 16, codebook_dim=3), 'VQ gradient': lambda: VectorQuantize(8, 16, learn='gradient'),
    'VQ linear': lambda: VectorQuantize(8, 16, learn='linear'), 'VQ rotation': lambda: VectorQuantize(8, 16, gradient='rotation'), 'VQ gumbel': lambda: VectorQuantize(8, 16, learn='gradient', gradient='gumbel'),
    'VQ entropy': lambda: VectorQuantize(8, 16, learn='gradient', entropy=.1, orthogonal=1.), 'RVQ dropout': lambda: ResidualVQ(8, 3, 16, quantize_dropout=.5),
    'RVQ narrow': lambda: ResidualVQ(8, 3, 16, codebook_dim=4, gradient='rotation'), 'OPQ': lambda: ProductQuantize(8, 4, 8, rotation='opq').fit(torch.randn(200, 8, generator=torch.Generator().manual_seed(0))),
    'LFQ bits': lambda: LFQ(bits=8, codes='bits'), 'LFQ normalized': lambda: LFQ(8, 5, normalize=True, group=3), 'BSQ bits': lambda: BSQ(70, 8, codes='bits'), 'FSQ binary': lambda: FSQ([2, 2, 3], 8)}
MAKERS = {c.__name__: (lambda c=c: c.example()) for c in subclasses()} | VARIANTS

@pytest.fixture(params=MAKERS)
def make(request):
    def f(): torch.manual_seed(0); return MAKERS[request.param]()
    return f

def data(q, *lead, seed=1): return torch.randn(*lead, q.dim, generator=torch.Generator().manual_seed(seed))

def test_discovery():
    names = [c.__name__ for c in subclasses()]
    assert set(names) >= {'VectorQuantize', 'ResidualVQ', 'ProductQuantize', 'AdditiveQuantize', 'FSQ', 'LFQ', 'BSQ'}, names

def test_shapes_and_round_trip(make):
    q = make().eval()
    assert q.codebook_size >= 1 and q.num_codebooks >= 1 and q.bits_per_token == pytest.approx(q.num_codebooks*np.log2(q.codebook_size))
    for lead in ((7,), (2, 5), (2, 3, 4), ()):
        z = data(q, *lead); out = q(z)
        assert isinstance(out, Quantized) and out.z_q.shape == z.shape and out.loss.shape == () and torch.isfinite(out.loss) and isinstance(out.aux, dict)
        assert out.codes.shape == (*lead, q.num_codebooks) if q.stacked else out.codes.shape == lead
        assert out.codes.dtype == torch.int64 and out.codes.min() >= 0 and out.codes.max() < q.codebook_size
        codes = q.encode(z)
        assert torch.equal(codes, out.codes) and torch.equal(q.decode(codes), out.z_q) and torch.equal(q.decode(codes.int()), out.z_q)

def test_deterministic_and_eval_changes_nothing(make):
    q = make().eval(); before = {k: v.clone() for k, v in q.state_dict().items()}; z = data(q, 64)
    a, b = q(z), q(z)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q) and torch.equal(a.loss, b.loss)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
    q.train(); c = q.encode(z)
    assert q.training and torch.equal(c, a.codes) and all(torch.equal(v, before[k]) for k, v in q.state_dict().items())

def test_gradient_reaches_input_and_parameters(make):
    q = make().train(); z = data(q, 4, 16).requires_grad_()
    out = q(z); (out.z_q.square().sum() + out.loss).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0
    for n, p in q.named_parameters(): assert p.grad is not None and torch.isfinite(p.grad).all(), n

def test_training_forward_value_is_the_code(make):
    q = make().train(); z = data(q, 32); g = torch.Generator().manual_seed(0)
    frozen = {k: v.clone() for k, v in q.state_dict().items()}
    torch.manual_seed(3); out = q(z); q.load_state_dict(frozen)               # decode with the codebook that was used
    keep = (out.codes >= 0).all(-1) if q.stacked else torch.ones(32, dtype=torch.bool)
    assert torch.equal(q.decode(out.codes[keep]), out.z_q[keep])

def test_mask(make):
    q = make().train(); z = data(q, 3, 6); mask = torch.tensor([True]*4 + [False]*2).repeat(3, 1)
    torch.manual_seed(5); a = q(z.masked_fill(~mask[..., None], float('nan')), mask)   # what is masked may be anything
    b = make().train(); torch.manual_seed(5); c = b(z.masked_fill(~mask[..., None], 1e4), mask)
    assert torch.equal(a.codes, c.codes) and torch.equal(a.z_q, c.z_q) and torch.equal(a.loss, c.loss) and torch.isfinite(a.loss)
    assert (a.z_q[~mask] == 0).all() and (a.codes[~mask] == -1).all()
    for k, v in q.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k
    q.eval(); codes = q.encode(z, mask); assert torch.equal(q.decode(codes, mask), q(z, mask).z_q)
    with pytest.raises(ValueError): q.decode(codes)                          # -1 without saying so
    none = q.train()(z, torch.zeros_like(mask)); assert none.loss == 0 or torch.isfinite(none.loss)


def test_masked_rows_leave_no_trace():
    for make in (lambda: VectorQuantize(4, 8), lambda: ResidualVQ(4, 2, 8), lambda: ProductQuantize(4, 2, 8)):
        torch.manual_seed(0); a = make().train(); torch.manual_seed(0); b = make().train()
        z = torch.randn(40, 4); mask = torch.arange(40) < 25
        la, lb = a(z, mask).loss, b(z[:25]).loss
        torch.testing.assert_close(la, lb)
        for k, v in a.state_dict().items(): torch.testing.assert_close(v, b.state_dict()[k])

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(make, dtype):
    q = make().eval(); z = data(q, 64).to(dtype); full = q(z.float())
    out = q(z); assert out.z_q.dtype == dtype and torch.equal(out.codes, full.codes)
    with torch.autocast('cpu', dtype): auto = q(z)
    assert torch.equal(auto.codes, full.codes) and auto.loss.dtype == torch.float32
    before = {k: v.clone() for k, v in q.state_dict().items()}; q.to(dtype)   # a model cast to half keeps its quantizer exact
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in q.state_dict().items())
    assert torch.equal(q(z).codes, full.codes)

def test_compiles_in_eval(make):
    q = make().eval(); z = data(q, 2, 32); want = q(z)
    torch._dynamo.reset(); got = torch.compile(q, fullgraph=True, backend='aot_eager')(z)
    assert torch.equal(got.codes, want.codes); torch.testing.assert_close(got.z_q, want.z_q)

def test_save_and_load(make, tmp_path):
    q = make(); q.train()(data(q, 64)); q.eval(); q.save_pretrained(tmp_path)
    assert not list(tmp_path.glob('*.bin')) and list(tmp_path.glob('*.safetensors')) and list(tmp_path.glob('config.json'))
    p = type(q).from_pretrained(tmp_path).eval(); z = data(q, 64, seed=2); a, b = q(z), p(z)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.z_q, b.z_q)

def test_bad_input(make):
    q = make().eval(); z = data(q, 3, 7)
    for bad in (z[..., :-1], z.long(), z > 0, z[:0], torch.full_like(z, float('nan')), torch.full_like(z, float('inf')), z.tolist(), None):
        with pytest.raises((ValueError, TypeError), match='z'): q(bad)
        with pytest.raises((ValueError, TypeError), match='z'): q.encode(bad)
    for mask in (torch.ones(3), torch.ones(7, 3, dtype=torch.bool)):
        with pytest.raises((ValueError, TypeError), match='mask'): q(z, mask)
    good = q.encode(z)
    for bad in (good + q.codebook_size, good - q.codebook_size, good.float(), *([good[..., 0], F.pad(good, (0, 1))] if q.stacked else [])):
        with pytest.raises((ValueError, TypeError), match='codes'): q.decode(bad)

def test_nan_is_never_a_plausible_code(make, monkeypatch):
    "On a GPU nobody looks before; what comes out then is -1 and NaN."
    q = make().eval(); z = data(q, 4); z[1] = float('nan')
    monkeypatch.setattr(type(q), '_flat', lambda self, z, mask, empty_ok=False: (z.reshape(-1, self.dim).float(), None))
    out = q(z)
    assert (out.codes[1] == -1).all() and out.z_q[1].isnan().all() and (out.codes[[0, 2, 3]] >= 0).all() and out.z_q[[0, 2, 3]].isfinite().all()

def test_channel_first(make):
    q = make().eval(); z = data(q, 2, 3, 4); out, want = ChannelFirst(q)(z.movedim(-1, 1)), q(z)
    assert torch.equal(out.codes, want.codes) and torch.equal(out.z_q, want.z_q.movedim(-1, 1))
    assert torch.equal(ChannelFirst(q).decode(ChannelFirst(q).encode(z.movedim(-1, 1))), out.z_q)
    with pytest.raises(ValueError): ChannelFirst(q)(torch.randn(2, q.dim + 1, 4))

def test_image_given_channel_first_says_so():
    with pytest.raises(ValueError, match='ChannelFirst'): VectorQuantize(8, 16)(torch.randn(2, 8, 5, 5))

# ---------------------------------------------------------------- against other implementations

def test_nearest_by_brute_force():
    z = torch.randn(300, 6); q = VectorQuantize(6, 40).fit(z, iters=3).eval()
    d = ((z[:, None].double() - q.codebook.double())**2).sum(-1)
    chosen = d.gather(1, q.encode(z)[:, None])[:, 0]
    assert (chosen <= d.min(1).values*(1 + 1e-6) + 1e-9).all()

def test_one_stage_one_block_one_codebook_are_vq():
    z = torch.randn(200, 6); vq = VectorQuantize(6, 16).fit(z).eval()
    others = ResidualVQ(6, 1, 16), ProductQuantize(6, 1, 16), AdditiveQuantize(6, 1, 16)
    others[0].books[0].set(vq.codebook[None]); others[1].book.set(vq.codebook[None]); others[2].books.copy_(vq.codebook[None]); others[2].ready = True
    for o in others: assert torch.equal(o.eval().encode(z)[..., 0], vq.encode(z)) and torch.equal(o(z).z_q, vq(z).z_q)

def test_kmeans_is_a_fixed_point_of_sklearn():
    from sklearn.cluster import KMeans
    torch.manual_seed(0); x = torch.randn(400, 5); ours = kmeans(x, 12, iters=200)
    theirs = KMeans(12, init=ours.numpy(), n_init=1, max_iter=50, algorithm='lloyd').fit(x.numpy())
    assert theirs.n_iter_ <= 2; np.testing.assert_allclose(theirs.cluster_centers_, ours, atol=1e-5)
    start = x[:12]; step = kmeans(x, 12, iters=1, centers=start); one = KMeans(12, init=start.numpy(), n_init=1, max_iter=1, algorithm='lloyd').fit(x.numpy())
    np.testing.assert_allclose(one.cluster_centers_, step, atol=1e-5)
    with pytest.raises(ValueError): kmeans(x, 0)

def test_additive_by_enumeration():
    torch.manual_seed(0); x = torch.randn(120, 3); q = AdditiveQuantize(3, 3, 4, beam=16).fit(x, iters=4)
    sums = torch.stack([q.codebook[0, i] + q.codebook[1, j] + q.codebook[2, k] for i, j, k in itertools.product(range(4), repeat=3)])
    best = torch.cdist(x, sums).square().min(1).values; ours = (q.decode(q.encode(x)) - x).square().sum(1)
    assert (ours > best - 1e-5).all() and (ours < best + 1e-5).float().mean() > .97
    greedy = torch.zeros(120, 3, dtype=torch.long)
    errors = [(x - q.decode(icm(x, greedy, q.codebook, s))).square().sum(1) for s in range(4)]
    assert all((b <= a + 1e-5).all() for a, b in zip(errors, errors[1:]))

def test_additive_least_squares_by_numpy():
    from tokbook.quantize.vq_survey import least_squares
    x = torch.randn(80, 3); codes = torch.randint(4, (80, 2)); O = torch.cat([F.one_hot(codes[:, m], 4) for m in range(2)], 1).double().numpy()
    fit = O @ np.linalg.lstsq(O, x.double().numpy(), rcond=None)[0]
    C = least_squares(x, codes, 4, ridge=1e-9); np.testing.assert_allclose(C[0][codes[:, 0]] + C[1][codes[:, 1]], fit, atol=1e-4)

def test_rvq_error_never_grows_when_zero_is_a_code():
    torch.manual_seed(0); q = ResidualVQ(4, 5, 8)
    for b in q.books: E = torch.randn(1, 8, 4); E[:, 0] = 0; b.set(E)
    z = torch.randn(50, 4); c = q.eval().encode(z)
    err = torch.stack([(z - q.decode(c[:, :m])).norm(dim=-1) for m in range(1, 6)])
    assert (err[1:] <= err[:-1] + 1e-6).all()

def test_every_residual_stage_reaches_the_encoder():
    torch.manual_seed(0); z = torch.randn(64, 8, requires_grad=True); q = ResidualVQ(8, 4, 16).fit(z.detach()); q.train()
    c = q.encode(z.detach()); want = torch.zeros_like(z)
    for m in range(1, 5): want += 2*.25*(z.detach() - q.decode(c[:, :m]))/z.numel()   # the sum of all stages' pulls
    torch.testing.assert_close(torch.autograd.grad(q(z).loss, z)[0], want)

@pytest.mark.parametrize('levels', [[8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 6, 5], [4, 3]])
def test_fsq_against_vector_quantize_pytorch(levels):
    from vector_quantize_pytorch import FSQ as Other
    z = torch.randn(2, 200, len(levels))*2; ours, (theirs, index) = FSQ(levels)(z), Other(levels)(z)
    torch.testing.assert_close(ours.z_q, theirs); assert torch.equal(ours.codes, index.long())
    ids = torch.arange(FSQ(levels).codebook_size); torch.testing.assert_close(FSQ(levels).decode(ids), FSQ(levels).codebook)

@pytest.mark.parametrize('ours,spherical', [(LFQ(bits=6, entropy_weight=1.), False), (BSQ(6, entropy_weight=1., tau=100.), True)])
def test_lfq_against_vector_quantize_pytorch(ours, spherical):
    from vector_quantize_pytorch import LFQ as Other
    torch.manual_seed(0); z = torch.randn(2, 50, 6)*.02
    other = Other(codebook_size=64, dim=6, spherical=spherical, entropy_loss_weight=1., commitment_loss_weight=ours.commitment).train()
    if spherical: z = F.normalize(z, dim=-1); ours.tau = 200.                # theirs has -2 z.c where p(c|u) ~ exp(tau c.u) has no 2
    ours.group = 6; a, b = ours.train()(z), other(z)
    torch.testing.assert_close(a.z_q, b.quantized)
    flip = bits_to_index(index_to_bits(a.codes, 6).flip(-1)); assert torch.equal(flip, b.indices.long())   # they count the first bit as the highest
    torch.testing.assert_close(a.loss, b.entropy_aux_loss, rtol=2e-2, atol=2e-2)                           # they clamp probabilities at 1e-5

def test_vq_against_vector_quantize_pytorch():
    from vector_quantize_pytorch import VectorQuantize as Other
    torch.manual_seed(0); other = Other(dim=6, codebook_size=32, decay=.9, commitment_weight=.25, rotation_trick=False).eval()
    ours = VectorQuantize(6, 32, decay=.9); ours.book.set(other._codebook.embed.detach().clone()); ours.eval(); z = torch.randn(3, 40, 6)
    a, (q, index, _) = ours(z), other(z)
    assert torch.equal(a.codes, index); torch.testing.assert_close(a.z_q, q)

def test_rvq_against_vector_quantize_pytorch():
    from vector_quantize_pytorch import ResidualVQ as Other
    torch.manual_seed(0); other = Other(dim=6, num_quantizers=4, codebook_size=16).eval(); z = torch.randn(3, 40, 6)
    ours = ResidualVQ(6, 4, 16).eval()
    for b, l in zip(ours.books, other.layers): b.set(l._codebook.embed.detach().clone())
    a, (q, index, _) = ours(z), other(z)
    assert torch.equal(a.codes, index); torch.testing.assert_close(a.z_q, q)

def test_ema_by_hand():
    torch.manual_seed(0); q = VectorQuantize(3, 4, decay=.75, eps=1e-5, dead_code_threshold=0).train(); z = torch.randn(200, 3)
    q.book.set(z[None, :4], count=2.); E = z[:4].double(); N = torch.full((4,), 2., dtype=torch.float64); m = E*2
    for i in range(3):
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(i)); c = torch.cdist(x.double(), E).argmin(1); one = F.one_hot(c, 4).double()
        N = .75*N + .25*one.sum(0); m = .75*m + .25*one.T @ x.double(); E = m/((N + 1e-5)/(N.sum() + 4e-5)*N.sum())[:, None]
        q(x); torch.testing.assert_close(q.codebook.double(), E, rtol=1e-5, atol=1e-5)

def test_revival_resets_the_moving_averages():
    torch.manual_seed(0); q = VectorQuantize(2, 8, dead_code_threshold=2.).train(); z = torch.randn(400, 2)
    q.book.set(torch.cat([z[:6], torch.full((2, 2), 50.)])[None], count=50.); q.book.count[0, 6:] = .01; q.book.total[0, 6:] = .5
    assert reset_dead_codes_(q, z) == 2
    new = q.codebook[6:]; assert all((z == e).all(1).any() for e in new)                    # on vectors of the batch
    torch.testing.assert_close(q.book.total[0, 6:]/q.book.count[0, 6:, None], new)       # and the averages agree with them
    before = new.clone(); q.book.update(); torch.testing.assert_close(q.codebook[6:], before, rtol=1e-3, atol=1e-3)   # nothing drags them back
    assert codebook_stats(q.encode(z), 8).usage == 1.

def test_threshold_is_capped_by_the_share():
    torch.manual_seed(0); q = VectorQuantize(4, 256, dead_code_threshold=2.).train()
    for i in range(60): q(torch.randn(64, 4))                                # a quarter of a hit a code and batch: 2 would kill them all
    assert q.book.credit(torch.tensor(.25)).item() == pytest.approx(.05) and q.book.credit(torch.tensor(100.)).item() == 4.

@pytest.mark.parametrize('L', [2, 5, 18])
def test_bsq_bound_and_entropy(L):
    u = F.normalize(torch.randn(20000, L), dim=-1); q = BSQ(L).eval()
    assert ((u - q(u).z_q).norm(dim=-1) <= (2 - 2/L**.5)**.5 + 1e-6).all()
    if L <= 5:
        l = torch.randn(50, L); signs = 2*index_to_bits(torch.arange(2**L), L) - 1.; p = torch.sigmoid(signs[None]*l[:, None]).prod(-1)
        H = lambda p: -(p*p.log()).sum(-1); one, batch = bit_entropy(l, group=L)
        torch.testing.assert_close(one, H(p).mean()); torch.testing.assert_close(batch, H(p.mean(0)))

def test_rotation_keeps_angle_and_length_ratio():
    torch.manual_seed(0); z = torch.randn(30, 5, requires_grad=True); e, g = torch.randn(30, 5), torch.randn(30, 5); out = rotate_to(z, e)
    grad, = torch.autograd.grad((out*g).sum(), z); assert torch.equal(out, e)
    torch.testing.assert_close(F.cosine_similarity(grad, z), F.cosine_similarity(g, e), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad.norm(dim=-1)/g.norm(dim=-1), e.norm(dim=-1)/z.norm(dim=-1).detach())
    zero = torch.zeros(1, 5, requires_grad=True); assert torch.isfinite(torch.autograd.grad(rotate_to(zero, e[:1]).sum(), zero)[0]).all()

def test_opq_is_a_rotation_and_helps():
    torch.manual_seed(0); x = torch.randn(800, 8) @ torch.randn(8, 8); pq, opq = ProductQuantize(8, 4, 8).fit(x).eval(), ProductQuantize(8, 4, 8, rotation='opq').fit(x).eval()
    torch.testing.assert_close(opq.R @ opq.R.T, torch.eye(8), rtol=0, atol=1e-6*10)
    assert (opq(x).z_q - x).square().mean() < .95*(pq(x).z_q - x).square().mean()

def test_usage_over_batches_is_usage_of_all():
    q = ResidualVQ.example().eval(); z = data(q, 90); use = CodeUsage.of(q)
    for part in z.split(37): use.update(q.encode(part))
    whole = [codebook_stats(c, 16) for c in q.encode(z).unbind(-1)]
    for i, s in enumerate(whole): assert [f[i].item() for f in use.compute()] == pytest.approx(list(s))
    p = torch.tensor([.5, .25, .25]); s = codebook_stats(torch.tensor([0]*2 + [1, 2]), 4)
    assert s.perplexity == pytest.approx(torch.exp(-(p*p.log()).sum()).item()) and s.usage == .75 and s.entropy_bits == 1.5
    with pytest.raises(ValueError): use.update(torch.full((3, 3), 16))

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('q', [FSQ.example(), ResidualVQ.example()], ids=['single', 'stacked'])
def test_layouts_round_trip(layout, q):
    c = q.encode(data(q, 2, 9)); ids = codes_to_ids(c, q, layout, 500)
    assert torch.equal(ids_to_codes(ids, q, layout, 500), c) and ids.min() >= 500 and ids.max() <= 500 + q.codebook_size*q.num_codebooks
    with pytest.raises(ValueError): ids_to_codes(ids - 400, q, layout, 500)
    with pytest.raises(ValueError): codes_to_ids(c, q, 'diagonal')

@pytest.mark.parametrize('tie', [True, False])
def test_extend_vocab(tie):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0); m = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tie))
    ids = torch.randint(50, (1, 7)); before = m(ids).logits; v = extend_vocab(m, None, ResidualVQ.example()); after = m(ids).logits
    assert after.shape[-1] == 50 + 3*16 + 3 and (v.offset, v.begin, v.end, v.pad) == (50, 98, 99, 100)
    torch.testing.assert_close(after[..., :50], before)                      # what it knew, it knows
    assert (m.get_input_embeddings().weight.data_ptr() == m.get_output_embeddings().weight.data_ptr()) == tie
    assert m(v.wrap(torch.zeros(1, 2, 3, dtype=torch.long))).logits.isfinite().all()
    m.lm_head = torch.nn.Linear(16, 60, bias=False)
    with pytest.raises(ValueError): extend_vocab(m, None, FSQ.example())

def test_unfitted_says_so():
    for q in (AdditiveQuantize(4, 2, 4), ProductQuantize(4, 2, 4, rotation='opq'), VectorQuantize(4, 8, kmeans_init=True), ResidualVQ(4, 2, 8, kmeans_init=True)):
        with pytest.raises(NotFitted): q.eval().encode(torch.randn(3, 4))
    with pytest.raises(ValueError): Codebook(1, 8, 4, learn='osmosis')

def test_training_state_survives_saving(tmp_path):
    "Stop after three steps and go on from the file: the same codebook as without stopping."
    step = lambda q, i: q(torch.randn(64, 4, generator=torch.Generator().manual_seed(i)))
    torch.manual_seed(0); a = ResidualVQ(4, 2, 16, kmeans_init=True, decay=.8).train()
    for i in range(3): step(a, i)
    a.save_pretrained(tmp_path); b = ResidualVQ.from_pretrained(tmp_path).train()
    for i in range(3, 12): step(a, i); step(b, i)
    for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k

@pytest.mark.parametrize('learn', ['ema', 'gradient', 'linear'])
@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('gradient', ['ste', 'gumbel'])
def test_revival_does_not_disturb_backward(learn, cosine, gradient):
    "The codebook changes in place between forward and backward; the gradient is that of the codebook that was used."
    def grads(threshold):
        torch.manual_seed(0); q = VectorQuantize(4, 16, learn=learn, cosine=cosine, gradient=gradient, entropy=.1, orthogonal=.1, dead_code_threshold=threshold).train()
        q.book.fresh = False; q.book.count[0, :5] = 0; q.book.count[0, 5:] = 30
        z = torch.randn(300, 4, requires_grad=True, generator=torch.Generator().manual_seed(1)); before = q.book.embed.detach().clone()
        out = q(z); (out.z_q.sum() + out.loss).backward()
        return [z.grad, *(p.grad for p in q.parameters())], (q.book.embed[0] != before[0]).any(1)
    (dead, moved), (alive, still) = grads(2.), grads(0)
    assert moved[:5].all() and (learn == 'ema' or not still.any())
    for a, b in zip(dead, alive): torch.testing.assert_close(a, b)
