"Generators beyond their notebook: q codes a token, schedules by brute force, save and load, bad input."
import math
from itertools import product
import pytest, torch
from tokbook.generator import ARGenerator, MaskedGenerator, fit_generator

G = lambda s=0: torch.Generator().manual_seed(s)
BOTH = pytest.mark.parametrize('cls', [ARGenerator, MaskedGenerator])


def shaken(model, std=.3):
    g = G(7)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=std, generator=g)
    return model.eval()


def test_all_sequences_sum_to_one_with_two_codes():
    m = shaken(ARGenerator(2, 3, classes=3, dim=16, heads=2, q=2))
    ids = torch.tensor(list(product(range(2), repeat=6))).view(-1, 3, 2)
    assert math.isclose(m.log_prob(ids, torch.full((64,), 2)).exp().sum().item(), 1, abs_tol=1e-4)


def test_draws_have_the_models_own_frequencies():
    m, n = shaken(ARGenerator(3, 2, dim=16, heads=2), .5), 20_000
    ids = torch.tensor(list(product(range(3), repeat=2))); p = m.log_prob(ids).exp()
    x = m.sample(batch=n, generator=G()); got = torch.bincount(3*x[:, 0] + x[:, 1], minlength=9)/n
    assert ((got - p).abs() < 4.5*(p*(1 - p)/n).sqrt() + 1e-4).all()


@BOTH
def test_loss_of_a_fresh_model_is_uniform(cls):
    m, ids = cls(7, 12, classes=3, q=2), torch.randint(7, (64, 12, 2), generator=G())
    assert abs(m.loss(ids, torch.zeros(64).long(), G()).item() - 2*math.log(7)) < .1
    assert m.loss(ids, reduction='none').shape == (64, 12)


@BOTH
def test_every_parameter_learns(cls):
    m = cls(7, 12, classes=3, q=2); m.loss(torch.randint(7, (64, 12, 2), generator=G()), torch.arange(64) % 3, G()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@BOTH
def test_shorter_sequences_are_the_same_model(cls):
    m, ids = shaken(cls(5, 8, dim=16, heads=2)), torch.randint(5, (3, 8), generator=G())
    if cls is ARGenerator: torch.testing.assert_close(m(ids)[:, :4], m(ids[:, :4]))
    assert m.loss(ids[:, :4]).isfinite() and m.sample(n=4, batch=2, generator=G()).shape == (2, 4)


@BOTH
def test_mode_is_put_back_and_dropout_is_off(cls):
    m = shaken(cls(5, 8, classes=2, dim=16, heads=2, dropout=.5)).train(); y = torch.tensor([0, 1])
    a = m.sample(y, generator=G()); torch.manual_seed(99); assert torch.equal(a, m.sample(y, generator=G())) and m.training


@BOTH
def test_greedy_needs_no_generator_and_top_k_one_is_greedy(cls):
    m = shaken(cls(5, 8, classes=2, dim=16, heads=2)); y = torch.tensor([0, 1])
    kw = {} if cls is ARGenerator else dict(choice_temperature=0.)
    assert torch.equal(m.sample(y, temperature=0., **kw), m.sample(y, top_k=1, **kw))


def test_mask_leaves_padding_out():
    m, ids = shaken(ARGenerator(5, 8, dim=16, heads=2)), torch.randint(5, (2, 8), generator=G())
    mask = torch.tensor([[True]*8, [True]*3 + [False]*5]); e = m.loss(ids, reduction='none')
    torch.testing.assert_close(m.loss(ids, mask=mask), e[mask].mean())
    with pytest.raises(ValueError, match='mask'): m.loss(ids, mask=mask[:, :4])


@pytest.mark.parametrize('steps', [1, 2, 5, 8, 20])
def test_masked_schedule_by_counting(steps, monkeypatch):
    "Holes before each call follow the cosine, at least one fewer each time, none at the end; what was revealed stays."
    m, seen = shaken(MaskedGenerator(5, 8, dim=16, heads=2)), []
    run = m._run; monkeypatch.setattr(m, '_run', lambda ids, known, y: (seen.append((ids.clone(), known.clone())), run(ids, known, y))[1])
    x = m.sample(batch=3, steps=steps, generator=G())
    want, left = [], 8
    for i in range(1, steps + 1):
        if not left: break
        want.append(left); left = 0 if i == steps else min(left - 1, math.floor(8*math.cos(math.pi/2*i/steps)))
    assert [(~k).sum(1).tolist() for _, k in seen] == [[w]*3 for w in want]
    for ids, k in seen: assert torch.equal(ids[..., 0][k], x[k])


def test_masked_hides_the_stated_share():
    m, seen = MaskedGenerator(5, 16, dim=16, heads=2), []
    run = m._run; m._run = lambda ids, known, y: (seen.append(known), run(ids, known, y))[1]
    m.loss(torch.zeros(4000, 16).long(), generator=G()); hidden = (~seen[0]).sum(1)
    assert hidden.min() >= 1 and abs(hidden.float().mean().item()/16 - 2/math.pi - .5/16) < .02  # the mean of cos, and rounding up
    e = m.loss(torch.zeros(8, 16).long(), generator=G(), reduction='none'); assert ((e == 0) == seen[1]).all()


def test_masked_loss_weights():
    m, ids = shaken(MaskedGenerator(5, 8, dim=16, heads=2)), torch.randint(5, (4, 8), generator=G())
    a, b = m.loss(ids, generator=G(), reduction='none'), m.loss(ids, generator=G(), unmasked=.5, reduction='none')
    hid = a > 0; torch.testing.assert_close(a[hid], b[hid])
    torch.testing.assert_close(m.loss(ids, generator=G(), unmasked=.5), b.sum()/(hid.sum() + .5*(~hid).sum()))


@BOTH
def test_round_trip(cls, tmp_path):
    m = shaken(cls(5, 8, classes=2, dim=16, heads=2, q=2, class_dropout=.2)); m.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path); y = torch.tensor([0, 1])
    assert torch.equal(again.sample(y, guidance=2., generator=G()), m.sample(y, guidance=2., generator=G()))
    assert not list(tmp_path.glob('*.bin')) and (tmp_path/'model.safetensors').exists()


@BOTH
def test_bad_input_is_named(cls):
    m = cls(5, 8, classes=2, dim=16, heads=2); ids, y = torch.zeros(2, 8).long(), torch.tensor([0, 1])
    for bad, word in ((ids + 5, 'ids'), (ids[0], 'ids'), (torch.zeros(2, 9).long(), 'length'), (ids[..., None], 'ids'), (ids[:0], 'ids')):
        with pytest.raises(ValueError, match=word): m.loss(bad)
    with pytest.raises(TypeError, match='ids'): m.loss(ids.float())
    for bad in (y + 1, y - 1, y[:1]):
        with pytest.raises(ValueError, match='labels'): m.loss(ids, bad)
    with pytest.raises(ValueError, match='classes'): cls(5, 8).sample(y)
    with pytest.raises(ValueError, match='guidance'): cls(5, 8, classes=2, class_dropout=0.).sample(y, guidance=2.)
    with pytest.raises(ValueError, match='batch'): m.sample(y, batch=3)
    with pytest.raises(ValueError, match='prefix'): m.sample(y, n=4, prefix=ids)
    with pytest.raises(ValueError): fit_generator(m, ids + 5, steps=1)


@BOTH
def test_training_is_reproducible_and_conditional(cls):
    "Class 0 is all zeros and class 1 all ones: a few steps tell them apart."
    y = torch.arange(64) % 2; ids = y[:, None].expand(-1, 6).contiguous(); runs = []
    for _ in range(2):
        torch.manual_seed(0); m = cls(3, 6, classes=2, dim=16, heads=2); h = fit_generator(m, ids, y, steps=60, lr=1e-2, batch=32)
        runs.append(h.curve()); assert torch.equal(m.sample(torch.tensor([0, 1]), temperature=0.), torch.tensor([[0]*6, [1]*6]))
    assert (runs[0] == runs[1]).all()
