"""4M: budgets, masks and spans against loops, the model's independences, generation's identities."""
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from tokbook.data import scenes
from tokbook.image import four_m
from tokbook.image.four_m import (FeatureModality, FourM, LightModality, MaskedBatch, MaskingStrategy, Memcodes, Modality, ModalityRegistry, MultimodalMasker, PatchModality, PixelModality,
                                  PlanStep, SpecialValueTokenizer, TextModality, checked_tokens, ensemble_any, generate_any, grouped_cross_entropy, grow_four_m, merge_spans, sample_budgets,
                                  span_mask, unmask_schedule)

torch.set_num_threads(1)
some = settings(max_examples=40, deadline=None, derandomize=True)
gen = lambda s=0: torch.Generator().manual_seed(s)

@some
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 6))
def test_budgets(seed, budget, m):
    g = gen(seed); a = 10**(4*torch.rand(50, m, generator=g) - 2.5); a[torch.rand(50, m, generator=g) < .3] = 0; a[:, 0] += .01
    most = torch.randint(0, 20, (50, m), generator=g); n = sample_budgets(a, budget, most, g)
    assert (n >= 0).all() and (n <= most).all() and (n.sum(1) <= budget).all() and (n[a == 0] == 0).all()
    roomy = sample_budgets(a, budget, torch.full((50, m), budget), gen(seed + 1))
    assert (roomy.sum(1) == budget).all() and torch.equal(roomy, sample_budgets(a, budget, torch.full((50, m), budget), gen(seed + 1)))

def t5(ids, keep, sentinel, eos): # span masking, the way one would say it
    inputs, target, inside, k = [], [], False, sentinel
    for i, stay in zip(ids, keep):
        if stay: inputs.append(i); inside = False
        else:
            if not inside: inputs.append(k); target.append(k); k += 1; inside = True
            target.append(i)
    return inputs, target + [eos] if target else []

@some
@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(0, 1))
def test_spans(seed, l, p):
    g = gen(seed); n = torch.randint(0, l + 1, (8, 1), generator=g); ids = torch.where(torch.arange(l) < n, torch.randint(50, 90, (8, l), generator=g), -1)
    keep = torch.rand(8, l, generator=g) < p; inputs, target = span_mask(ids, keep, 1, 0)
    for i in range(8):
        row = [t for t in ids[i].tolist() if t >= 0]; a, b = ([t for t in x[i].tolist() if t >= 0] for x in (inputs, target))
        assert (a, b) == t5(row, keep[i].tolist(), 1, 0) and merge_spans(a, b, range(1, 40), 0) == row
        assert inputs[i, len(a):].eq(-1).all() and target[i, len(b):].eq(-1).all()

TOK = SpecialValueTokenizer(['a red ball left of a blue cone'], bins=8, groups=2, sentinels=4)
def registry():
    data = scenes(60, 8, objects=(1, 2))
    return ModalityRegistry([PatchModality('rgb', lambda s: s.image, 8, 2, 12), PatchModality('depth', lambda s: s.depth[:, None], 8, 4, 6), TextModality('caption', lambda s: s.captions, TOK, 60),
                             TextModality('count', lambda s: [f'v1=0 v0={n} v1=1 v0={n}' for n in s.count.tolist()], TOK, 4, chunk=2)]).fit(data), data
R, DATA = registry(); T = R.encode(DATA)

@some
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.sampled_from([.01, 1., 10.]))
def test_masker(seed, n_in, n_out, alpha):
    B = MultimodalMasker(R, TOK, n_in, n_out, [MaskingStrategy(1., alpha, alpha)])(T, gen(seed))
    assert B.enc.shape == (60, n_in, 3) and B.dec.shape == (60, n_out, 3) and B.target.shape == (60, n_out)
    assert torch.equal(B.dec[..., 0] >= 0, B.target >= 0)
    for i in range(0, 60, 7):
        for j, m in enumerate(R):
            e = B.enc[i][B.enc[i, :, 0] == j]; here = B.dec[i, :, 0] == j; d, t = B.dec[i][here], B.target[i][here]
            if m.kind == 'img':
                assert not set(e[:, 2].tolist()) & set(d[:, 2].tolist())
                assert torch.equal(T[m.name][i][e[:, 2]], e[:, 1]) and torch.equal(T[m.name][i][d[:, 2]], t) and (d[:, 1] == -1).all()
                continue
            marks = range(TOK.sentinels, TOK.sentinels + TOK.n_sentinels)
            assert e[:, 2].tolist() == list(range(len(e))) and d[:, 2].tolist() == list(range(len(d)))
            if len(d): assert d[0, 1] in marks and d[1:, 1].tolist() == t[:-1].tolist() # begins with a sentinel, shifted by one
            if m.chunk > 1: assert len([k for k in e[:, 1].tolist() if k not in marks]) % 2 == 0 # pairs stay or go as pairs

def test_whole_sequence_is_merged_from_input_and_target():
    one = R.subset(['caption']); B = MultimodalMasker(one, TOK, 200, 200, [MaskingStrategy(1., 1., 1.)])({'caption': T['caption']}, gen(3)); done = 0
    for i in range(60):
        e = [k for k in B.enc[i, :, 1].tolist() if k >= 0]; t = B.target[i][B.target[i] >= 0].tolist()
        if not t: assert e == T['caption'][i][T['caption'][i] >= 0].tolist(); continue
        full = [B.dec[i, 0, 1].item()] + t
        assert merge_spans(e, full, range(1, 5), 0) == T['caption'][i][T['caption'][i] >= 0].tolist(); done += 1
    assert done > 30

def model(seed=0, reg=R): torch.manual_seed(seed); return FourM(reg, 16, 2, 2, 2).eval()

def test_model_independences():
    m = model(); B = MultimodalMasker(R, TOK, 24, 24, [MaskingStrategy(1., 10., 10.)])(T, gen(1)); ctx = m.read(B.enc); y = m.say(B.dec, *ctx); mod = B.dec[..., 0]
    for j in range(len(R)): # a view's targets do not see another view's
        other = B.dec.clone(); other[..., 1] = torch.where((mod >= 0) & (mod != j), 0, other[..., 1])
        assert torch.allclose(m.say(other, *ctx)[mod == j], y[mod == j], atol=1e-5)
    seq = mod == R.index('caption'); late = B.dec.clone(); late[..., 1] = torch.where(seq & (B.dec[..., 2] > 2), 60, late[..., 1])
    early = seq & (B.dec[..., 2] <= 2); assert torch.allclose(m.say(late, *ctx)[early], y[early], atol=1e-5) and (m.say(late, *ctx) - y)[seq].abs().max() > 1e-3 # causal
    padded = m.read(F.pad(B.enc, (0, 0, 3, 4), value=-1)); assert torch.allclose(m.say(B.dec, *padded), y, atol=1e-5)
    loss, parts = m(B); again, _ = m(tuple(B)); assert torch.equal(loss, again) and math.isclose(loss.item(), sum(v.item() for v in parts.values())/len(parts), rel_tol=1e-5)

@some
@given(st.integers(0, 10**6))
def test_grouped_cross_entropy(seed):
    g = gen(seed); sizes = torch.randint(1, 9, (4,), generator=g).tolist(); n = int(torch.randint(1, 30, (1,), generator=g))
    w, y = torch.randn(sum(sizes), 5, generator=g, requires_grad=True), torch.randn(n, 5, generator=g, requires_grad=True)
    group = torch.randint(-1, 4, (n,), generator=g); target = (torch.rand(n, generator=g)*torch.tensor(sizes)[group.clamp(min=0)]).long()
    first = [sum(sizes[:i]) for i in range(4)]
    ref = [F.cross_entropy(y[group == i]@w[a:a + s].T, target[group == i]) if (group == i).any() else y.sum()*0 for i, (a, s) in enumerate(zip(first, sizes))]
    for small in (four_m._SMALL, 0): # plain products, and the fused loss
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(four_m, '_SMALL', small); loss, counts = grouped_cross_entropy(y, w, sizes, target, group)
            known = grouped_cross_entropy(y, w, sizes, target, group, counts)[0]; assert torch.equal(known, loss)
        assert counts == [(group == i).sum().item() for i in range(4)] and torch.allclose(loss, torch.stack(ref), atol=1e-5)
        if sum(counts):
            for a, b in zip(torch.autograd.grad(loss.sum(), (y, w)), torch.autograd.grad(sum(ref), (y, w), retain_graph=True)): assert torch.allclose(a, b, atol=1e-5)

def test_generation_identities():
    m = model(2); two = {n: x[:3] for n, x in T.items()}; run = lambda *a, **k: generate_any(m, *a, tokenizer=TOK, generator=gen(5), **k)
    once = run({'rgb': two['rgb']}, [PlanStep('depth', steps=1, temperature=0)])['depth']
    assert torch.equal(once, m.logits({'rgb': two['rgb']}, 'depth', torch.arange(4).expand(3, -1)).argmax(-1))
    both = [(['rgb'], 1.), (['caption'], 0.)]; given = {n: two[n] for n in ('rgb', 'caption')}
    assert torch.equal(run(given, [PlanStep('depth', conditions=both)])['depth'], run(given, [PlanStep('depth', given=['rgb'])])['depth']) # weight 0: not there
    free = run({}, [PlanStep('depth')], b=3)['depth']; assert torch.equal(free, run(given, [PlanStep('depth', cfg=0)])['depth'])
    chain = run({'rgb': two['rgb']}, [PlanStep('count'), PlanStep('caption', given=['count'])]); assert set(chain) == {'rgb', 'count', 'caption'}
    for n in ('count', 'caption'): assert chain[n].shape == (3, R[n].max_tokens) and ((chain[n] >= 0).int().diff(dim=1) <= 0).all() # padding behind the end only
    assert torch.equal(two['rgb'], chain['rgb']) and ensemble_any(m, {'rgb': two['rgb']}, PlanStep('depth'), 2, generator=gen()).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match='neither given'): run(given, [PlanStep('depth', given=['count'])])
    with pytest.raises(ValueError): PlanStep('depth', steps=0)
    with pytest.raises(ValueError): ensemble_any(m, {}, PlanStep('caption'))

@some
@given(st.integers(1, 300), st.integers(1, 30), st.sampled_from(['maskgit', 'roar']))
def test_schedules_fill_everything(n, steps, scheme):
    s = unmask_schedule(n, steps, scheme); assert sum(s) == n and min(s) >= 1 and len(s) <= steps

def test_growing_changes_nothing():
    m = model(4); new = ModalityRegistry([*R, LightModality(TOK)]); big = grow_four_m(m, new).eval()
    for src, to in (('rgb', 'depth'), ('caption', 'rgb'), ('depth', 'caption')): assert torch.equal(m.nll(T, [src], to, TOK), big.nll(T, [src], to, TOK))
    with pytest.raises(ValueError): grow_four_m(m, ModalityRegistry([LightModality(TOK), *R]))
    with pytest.raises(KeyError): LightModality(TOK) and R['light']

@some
@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 4))
def test_values_within_half_a_bin(x, bins, groups):
    t = SpecialValueTokenizer.__new__(SpecialValueTokenizer); t.bins, t.groups = bins, groups
    for g in range(groups): assert abs(t.value(t.bin(x, g)) - x) <= .5/bins + 1e-9

def test_texts_come_back():
    for s in ('a red ball', 'v0=3 v1=7 cone v0=1', 'v1=0', 'left of v0=7 v0=7 a', ''): assert TOK.decode(TOK.encode(s)) == s
    for bad in ('v0=8', 'v2=1', 'v0=x'):
        with pytest.raises(ValueError): TOK.encode(bad)
    with pytest.raises(ValueError): SpecialValueTokenizer(['a'], groups=0)

def test_memcodes_contract():
    from tokbook.quantize.vq_survey import Quantized
    q = Memcodes.example(8).eval(); z = torch.randn(3, 5, 8, generator=gen()); out = q(z)
    assert isinstance(out, Quantized) and out.codes.shape == (3, 5, 2) and torch.equal(q.decode(q.encode(z)), out.z_q) and q.bits_per_token == 8
    q.train(); a = q(z); assert torch.equal(a.z_q.detach(), q.decode(a.codes)) and torch.equal(q.encode(z), out.codes)
    with pytest.raises(ValueError): q.encode(torch.randn(2, 7))
    with pytest.raises(ValueError): checked_tokens(R, {'depth': torch.zeros(2, 3, dtype=torch.long)})
    with pytest.raises(ValueError): Modality('x', 'img', 4, 4, grid=(2, 3))

def test_vectors_are_given_and_never_asked():
    reg = ModalityRegistry([PixelModality('pixels', lambda s: s.image, 8, 2), R['depth']]); t = reg.encode(DATA); m = model(0, reg)
    B = MultimodalMasker(reg, None, 6, 4)(t, gen(2)); assert (B.dec[..., 0] != 0).all() and (B.enc[..., 0] == 0).any()
    x, _ = m._embed(B.enc, B.features); i, j = (B.enc[..., 0] == 0).nonzero()[0].tolist()
    assert torch.allclose(x[i, j], m.project['pixels'](t['pixels'][i, B.enc[i, j, 2]]), atol=1e-5)
    with pytest.raises(ValueError, match='continuous'): m.head('pixels')
