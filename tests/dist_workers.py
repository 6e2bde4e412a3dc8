"""Training runs for tests that need processes of their own: one that is killed, two that share a batch.

    python dist_workers.py run OUT CHECKPOINT [KILL_AT]   one process; dies by SIGKILL in the middle of step KILL_AT
    python dist_workers.py dist OUT CHECKPOINT            one of several processes (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, as torchrun does)
"""
import json, os, signal, sys
import torch
import torch.nn.functional as F
from torch import nn
from tokbook.train import Batches, fit

class Noisy(torch.utils.data.Dataset):
    "A map dataset whose items are augmented at random, to see that a resumed run draws the same noise."
    def __len__(self): return 64
    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 8)*(i % 7 - 3) + .1*torch.randn(8)
        return x, x.flip(0)

def net(dropout=.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))

def loss_fn(model, batch):
    x, y = batch
    out = model(x)
    return dict(loss=F.mse_loss(out, y), noise=torch.rand(())) # `noise` shows the state of the random generator

def run(checkpoint, kill_at=None, **kw):
    "40 steps of 8 examples: an epoch is 8 steps, a round 7, so that a checkpoint falls in the middle of an epoch."
    step = iter(range(10**6))
    def loss(model, batch):
        if model.training and kill_at is not None and next(step) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)
    valid = Batches((torch.ones(6, 8), torch.zeros(6, 8)), 4, shuffle=False)
    return fit(net(), loss, Batches(Noisy(), 8), **{**dict(steps=40, lr=1e-2, wd=.1, clip=1., ema=.9, valid=valid, checkpoint=checkpoint, every=7, resume=True), **kw})

def dist_run(distributed, dropout=0., stop_at=None, draws=None, **kw):
    "10 steps that, without dropout, do not depend on how many processes share the batch (no batch statistics)."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
    data, step = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), iter(range(100))
    def loss(model, batch):
        if model.training and next(step) == stop_at: raise KeyboardInterrupt
        if model.training and draws is not None: draws.append(torch.rand(()).item())
        return dict(loss=F.mse_loss(model(batch[0]), batch[1]), size=float(len(batch[0])))
    return fit(model, loss, Batches((data, data.flip(1)), 8), steps=10, lr=1e-2, clip=1., ema=.9, valid=[(data, data)], every=4, distributed=distributed, **kw)

def report(h, out):
    "The run as JSON; floats survive it exactly."
    weights = lambda m: {k: v.tolist() for k, v in m.state_dict().items()}
    with open(out, 'w') as f: json.dump(dict(losses=h.losses, valid=h.valid, lr=h.lr, model=weights(h.model), ema=weights(h.ema)), f)

if __name__ == '__main__':
    torch.set_num_threads(1)
    kind, out, checkpoint, *rest = sys.argv[1:]
    if kind == 'run': report(run(checkpoint, *map(int, rest)), out)
    else:
        rank = os.environ.get('RANK', 0)
        report(dist_run(True), f'{out}.plain.{rank}')
        draws = []
        report(dist_run(True, dropout=.5, draws=draws), f'{out}.dropout.{rank}')
        with open(f'{out}.draws.{rank}', 'w') as f: json.dump(draws, f)
        try: dist_run(True, dropout=.5, draws=draws, stop_at=6, checkpoint=checkpoint)
        except KeyboardInterrupt: pass
        report(dist_run(True, dropout=.5, draws=draws, checkpoint=checkpoint, resume=True), f'{out}.resumed.{rank}')
