"""Two processes over gloo: everything a quantizer keeps is the same on both ranks, and what one process that sees the whole batch would keep."""
import os, socket, traceback
from datetime import timedelta
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from tokbook.quantize.vq_survey import (CodeUsage, ProductQuantize, ResidualVQ, VectorQuantize, _draw, lockstep)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason='torch was built without torch.distributed')
DIM, K, STEPS, N = 4, 16, 6, 96

MAKE = dict(
    ema=lambda: VectorQuantize(DIM, K, decay=.8, kmeans_init=True),
    cosine=lambda: VectorQuantize(DIM, K, decay=.8, cosine=True, kmeans_init=True),
    counts=lambda: VectorQuantize(DIM, K, decay=.8, learn='gradient', kmeans_init=True),
    narrow=lambda: VectorQuantize(DIM, K, codebook_dim=2, decay=.8),
    residual=lambda: ResidualVQ(DIM, 3, K, decay=.8, kmeans_init=True),
    product=lambda: ProductQuantize(DIM, 2, K, decay=.8, kmeans_init=True))

def batch(step):
    "The whole batch of a step: in the second half of the run the data moves away, so that codes die and are revived."
    g = torch.Generator().manual_seed(step)
    return torch.randn(N, DIM, generator=g) + (8. if step >= STEPS//2 else 0.)

def part(x, rank, how):
    "What a rank sees of a batch, and a mask or None."
    if how == 'unequal': return (x[:70] if rank == 0 else x[70:]), None
    if how == 'interleaved': return x[rank::2], None
    if how == 'empty': return (x if rank == 0 else x[:0]), None
    if how == 'swapped': return (x[50:] if rank == 0 else x[:50]), None
    mask = torch.zeros(N, dtype=torch.bool); mask[rank*60:60 + rank*36] = True      # 'masked': everyone holds all, and counts its own
    return x, mask

def kill_some(q):
    "Starve a few codes, the same ones everywhere."
    for m in q.modules():
        if hasattr(m, 'revive'): m.count[:, :5] = 0

def state(q): return {k: v.clone() for k, v in q.state_dict().items()}

def run(q, rank=None, how=None):
    q.train()
    for i in range(STEPS):
        x, mask = (batch(i), None) if rank is None else part(batch(i), rank, how)
        q(x, mask)
        if i == 2: kill_some(q)
    return state(q)

def child(rank, port, out):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try: out.put((rank, {task.__name__: task(rank) for task in (all_runs, uneven, draws, ddp)}, None))
    except Exception: out.put((rank, None, traceback.format_exc()))
    finally: dist.destroy_process_group()

@pytest.fixture(scope='module')
def both():
    "What each task returned in two processes: name -> (rank 0's, rank 1's). A hang or an error fails the tests."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ctx = mp.get_context('spawn'); out = ctx.Queue()
    ps = [ctx.Process(target=child, args=(r, port, out), daemon=True) for r in range(2)]
    for p in ps: p.start()
    try: got = sorted((out.get(timeout=240) for _ in ps), key=lambda r: r[0])
    finally:
        for p in ps:
            p.join(10)
            if p.is_alive(): p.kill()
    for rank, _, error in got: assert error is None, f'rank {rank}:\n{error}'
    tensors = lambda states: {k: {n: torch.as_tensor(v) for n, v in s.items()} for k, s in states.items()}
    return {name: [tensors(result[name]) for _, result, _ in got] for name in got[0][1]}

def plain(states): return {k: {n: v.tolist() for n, v in s.items()} for k, s in states.items()}   # lists travel between processes without shared memory

def same(a, b, name):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), f'{name}: ranks disagree on {k}'

def close(a, b, name):
    for k in a: torch.testing.assert_close(a[k].float(), b[k].float(), rtol=1e-4, atol=1e-4, msg=lambda m: f'{name}, {k}: {m}')

def build(name):
    torch.manual_seed(0); return MAKE[name]()

def all_runs(rank):
    return plain({f'{name} {how}': run(build(name), rank, how) for name in MAKE for how in HOWS})

HOWS = ('unequal', 'interleaved', 'swapped', 'empty', 'masked')

def test_state_is_that_of_one_process(both):
    a, b = both['all_runs']
    for name in MAKE:
        q = build(name); alone = run(q)
        before = run(build(name)); close(alone, before, name)          # one process repeats itself
        for how in HOWS:
            key = f'{name} {how}'
            same(a[key], b[key], key); close(a[key], alone, key)

def uneven(rank):
    "Rank 0 has five batches, rank 1 has two; then usage over both."
    torch.manual_seed(0); q = build('residual').train()
    mine = [batch(i)[:48] for i in range(5)] if rank == 0 else [batch(i)[48:] for i in range(2)]
    for x in lockstep(q, mine): q(x)
    use = CodeUsage.of(q)
    for x in mine: use.update(q.encode(x))
    s = use.compute()
    alone = VectorQuantize(DIM, K, sync=False, kmeans_init=True).train()
    if rank == 1: alone(batch(0))                                      # only one rank calls: would hang if it waited for the other
    local = CodeUsage.of(q).update(q.encode(mine[0])).compute(sync=False)
    return plain(dict(state=state(q), usage=dict(perplexity=s.perplexity, usage=s.usage), local=dict(perplexity=local.perplexity)))

def test_uneven_numbers_of_batches_do_not_hang(both):
    a, b = both['uneven']
    same(a['state'], b['state'], 'uneven'); same(a['usage'], b['usage'], 'usage')
    assert not torch.equal(a['local']['perplexity'], b['local']['perplexity'])
    q = build('residual').train()
    for i in range(5): q(batch(i) if i < 2 else batch(i)[:48])
    close(a['state'], state(q), 'uneven')
    use = CodeUsage.of(q)
    for i in range(5): use.update(q.encode(batch(i)[:48]))
    for i in range(2): use.update(q.encode(batch(i)[48:]))
    torch.testing.assert_close(a['usage']['perplexity'].double(), use.compute().perplexity, rtol=1e-4, atol=1e-4)

def draws(rank):
    g = torch.Generator().manual_seed(1); x = torch.randn(1, 40, DIM, generator=g); x = torch.cat([x, x[:, :5]], 1)   # five vectors twice
    mine = x[:, :33] if rank == 0 else x[:, 33:]
    rows, valid = _draw(mine, 50, torch.tensor(3)); few, ok = _draw(mine, 7, torch.tensor(3)); none, no = _draw(mine[:, :0], 7, torch.tensor(3))
    return plain(dict(all=dict(rows=rows, valid=valid), few=dict(rows=few, valid=ok), none=dict(rows=none, valid=no)))

def test_lottery_is_blind_to_the_partition(both):
    a, b = both['draws']
    for k in a: same(a[k], b[k], k)
    g = torch.Generator().manual_seed(1); x = torch.randn(1, 40, DIM, generator=g)
    for perm in (torch.arange(40), torch.randperm(40, generator=g)):
        rows, valid = _draw(x[:, perm], 50, torch.tensor(3))
        assert torch.equal(rows, a['all']['rows']) and torch.equal(valid, a['all']['valid'].bool()) and valid.sum() == 40
        assert torch.equal(_draw(x[:, perm], 7, torch.tensor(3))[0], a['few']['rows'])
    assert not a['none']['valid'].any()
    assert not torch.equal(_draw(x, 7, torch.tensor(4))[0], a['few']['rows'])

class Net(torch.nn.Module):
    def __init__(self): super().__init__(); self.inner = torch.nn.Linear(DIM, DIM); self.q = build('counts')
    def forward(self, x, mask): return self.q(self.inner(x), mask)

def ddp(rank):
    "Under DistributedDataParallel a rank without data passes an all-masked batch, and everything stays in step."
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Net().train()); opt = torch.optim.SGD(model.parameters(), .1)
    for i in range(4):
        x = batch(i)[:48] if rank == 0 else batch(i)[48:]
        out = model(x, torch.full((48,), not (rank == 1 and i >= 2)))
        opt.zero_grad(); (out.loss + out.z_q.square().mean()).backward(); opt.step()
    return plain(dict(state=state(model.module)))

def test_under_ddp(both):
    a, b = both['ddp']; same(a['state'], b['state'], 'ddp')
