"""Training: what needs processes of its own, or a reference that a notebook is the wrong place for."""
import json, os, signal, socket, subprocess, sys
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from torch import nn
from tokbook.train import Batches, fit, load_tree, save_tree
import dist_workers as W

here = Path(__file__).parent
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': f'{here.parent}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def worker(*args, **extra): return subprocess.Popen([sys.executable, str(here/'dist_workers.py'), *map(str, args)], env={**env, **extra}, stderr=subprocess.PIPE, text=True)

def same(a, b): # bit for bit; JSON writes a float so that reading it gives the same float
    assert json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)

def close(a, b, tol=1e-5):
    flat = lambda d: torch.tensor([x for v in d.values() for x in torch.tensor(v).flatten().tolist()])
    torch.testing.assert_close(flat(a), flat(b), rtol=tol, atol=tol)

def test_killed_run_resumes_bit_for_bit(tmp_path):
    whole = W.run(tmp_path/'whole.safetensors'); W.report(whole, tmp_path/'whole.json')
    p = worker('run', tmp_path/'never.json', tmp_path/'run.safetensors', 18) # killed in the middle of step 18: epoch 2, round 2
    err = p.communicate(timeout=300)[1]
    assert p.returncode == -signal.SIGKILL, err
    assert not (tmp_path/'never.json').exists()
    assert load_tree(tmp_path/'run.safetensors')['step'] == 14
    resumed = W.run(tmp_path/'run.safetensors'); W.report(resumed, tmp_path/'resumed.json')
    assert len(resumed.losses['loss']) == 40
    same(json.loads((tmp_path/'whole.json').read_text()), json.loads((tmp_path/'resumed.json').read_text()))

def test_a_checkpoint_continues_with_other_rounds_and_ends_only_once(tmp_path):
    f = tmp_path/'run.safetensors'
    whole = W.run(tmp_path/'whole.safetensors', valid=None)
    class Stop(Exception): pass
    def loss(model, batch, steps=iter(range(100))):
        if next(steps) == 12: raise Stop
        return W.loss_fn(model, batch)
    with pytest.raises(Stop):
        fit(W.net(), loss, Batches(W.Noisy(), 8), steps=40, lr=1e-2, wd=.1, clip=1., ema=.9, checkpoint=f, every=5)
    resumed = W.run(f, valid=None, every=9) # from step 10; rounds of another length
    assert resumed.losses == whole.losses
    again = W.run(f, valid=None) # nothing is left to do
    assert again.losses == whole.losses
    same({k: v.tolist() for k, v in again.model.state_dict().items()}, {k: v.tolist() for k, v in whole.model.state_dict().items()})

@pytest.mark.parametrize('opt', ['adamw', 'adam', 'sgd', torch.optim.RMSprop, torch.optim.Adagrad])
def test_every_optimizer_resumes(tmp_path, opt):
    kw = dict(opt=opt, steps=12, valid=None, every=4, schedule='onecycle')
    whole = W.run(tmp_path/'a.safetensors', **kw)
    def loss(model, batch, steps=iter(range(100))):
        if next(steps) == 9: raise KeyboardInterrupt
        return W.loss_fn(model, batch)
    with pytest.raises(KeyboardInterrupt):
        fit(W.net(), loss, Batches(W.Noisy(), 8), lr=1e-2, wd=.1, clip=1., ema=.9, checkpoint=tmp_path/'b.safetensors', **{k: v for k, v in kw.items() if k != 'valid'})
    assert W.run(tmp_path/'b.safetensors', **kw).losses == whole.losses

def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    f = tmp_path/'x.safetensors'; save_tree(f, {'a': torch.ones(2)})
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): save_tree(f, {'a': torch.zeros(2)})
    assert load_tree(f)['a'].tolist() == [1, 1] and [p.name for p in tmp_path.iterdir()] == ['x.safetensors']

@pytest.mark.parametrize('change,said', [(dict(lr=1e-3), 'lr is 0.01 there and 0.001 here'), (dict(steps=41), 'steps'), (dict(seed=1), 'seed'), (dict(ema=None), 'ema'), (dict(opt='sgd'), "opt is adamw there and sgd here")])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, said):
    f = tmp_path/'run.safetensors'; W.run(f, steps=40)
    with pytest.raises(ValueError, match=said): W.run(f, **change)

def test_a_checkpoint_of_another_model_or_other_data_is_refused(tmp_path):
    f, kw = tmp_path/'run.safetensors', dict(steps=2, checkpoint=tmp_path/'run.safetensors', resume=True)
    x = torch.randn(16, 4); loss = lambda m, b: m(b).square().mean()
    fit(nn.Linear(4, 4), loss, Batches(x, 4), **kw)
    with pytest.raises(ValueError, match='model is Linear of 20 weights'): fit(nn.Linear(4, 3), loss, Batches(x, 4), **kw)
    with pytest.raises(ValueError, match='train is 16 examples, bs=4'): fit(nn.Linear(4, 4), loss, Batches(x, 8), **kw)

def test_two_processes_equal_one(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    e = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    ps = [worker('dist', tmp_path/'out', tmp_path/'c.safetensors', RANK=str(r), LOCAL_RANK=str(r), **e) for r in range(2)]
    errs = [p.communicate(timeout=300)[1] for p in ps]
    assert [p.returncode for p in ps] == [0, 0], errs
    got = {k: [json.loads((tmp_path/f'out.{k}.{r}').read_text()) for r in range(2)] for k in ('plain', 'dropout', 'resumed')}
    W.report(W.dist_run(False), tmp_path/'one'); one = json.loads((tmp_path/'one').read_text())
    for k, (a, b) in got.items(): same(a, b) # both processes end with the same weights and report the same numbers
    a = got['plain'][0]
    assert a['losses'].pop('size') == [4.]*10 and one['losses'].pop('size') == [8.]*10 # each process saw half of each batch
    for k in ('losses', 'model', 'ema', 'valid'): close(a[k], one[k])
    assert a['lr'] == one['lr']
    same(got['dropout'], got['resumed']) # stopped in step 6, continued from step 4
    assert got['dropout'][0]['losses']['loss'] != a['losses']['loss']
    draws = [json.loads((tmp_path/f'out.draws.{r}').read_text()) for r in range(2)]
    assert not set(draws[0]) & set(draws[1]) # each process draws its own noise

def test_nothing_waits_for_the_device_at_every_step(monkeypatch):
    n, x, counts = [0], torch.randn(32, 4), []
    for name in ('item', 'cpu', 'tolist', 'numpy', '__float__', '__int__', '__bool__'): # each would wait for a GPU
        def counted(self, *args, f=getattr(torch.Tensor, name), **kw): n[0] += 1; return f(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    for steps in (4, 40):
        n[0] = 0
        h = fit(nn.Linear(4, 4), lambda m, b: dict(loss=m(b).square().mean(), a=b.mean()), [x]*steps, steps=steps, every=steps, opt='sgd', ema=.9, clip=1.)
        counts.append(n[0]); assert len(h.losses['a']) == steps
    assert counts[0] == counts[1] > 0

def test_fastai_callbacks_and_a_model_whose_attributes_share_their_names(recwarn):
    from fastai.callback.tracker import EarlyStoppingCallback
    class Model(nn.Linear):
        def __init__(self): super().__init__(4, 4); self.ema = self.sums = self.new = self.last = self.on = self.steps = None
    x = torch.randn(32, 4)
    h = fit(Model(), lambda m, b: m(b).square().mean(), [x, x], steps=40, lr=0., ema=.9, valid=torch.utils.data.DataLoader(x, 16), every=2, callbacks=[EarlyStoppingCallback(patience=2)], progress=True)
    assert len(h.losses['loss']) == 6 and h.valid['step'] == [2, 4, 6] # no validation improves on the first
    assert not [w for w in recwarn if 'shadowing' in str(w.message)]

def test_validation_sees_the_same_batches_and_noise_every_time_and_disturbs_nothing():
    x = torch.randn(32, 4); loss = lambda m, b: (m(b) + torch.randn(b.shape)).square().mean()
    valid = Batches(lambda g, n: torch.randn(n, 4, generator=g), 8, steps=3)
    make = lambda: torch.manual_seed(0) and nn.Linear(4, 4)
    a = fit(make(), loss, Batches(x, 8), steps=6, lr=0., every=2, valid=valid)
    b = fit(make(), loss, Batches(x, 8), steps=6, lr=0.)
    assert len(set(a.valid['loss'])) == 1 and valid.epoch == 0
    assert a.losses == b.losses

def test_progress_is_one_line_and_none_under_tests(monkeypatch, capsys):
    import time
    x, run = torch.randn(32, 4), lambda **kw: fit(nn.Linear(4, 4), lambda m, b: m(b).square().mean(), Batches(x, 8), steps=9, **kw)
    clock = iter(range(10**6)); monkeypatch.setattr(time, 'time', lambda: next(clock)) # every step takes a second
    run(progress=True); assert capsys.readouterr() == ('', '')
    monkeypatch.delenv('PYTEST_CURRENT_TEST'); monkeypatch.delenv('IN_TEST', raising=False); monkeypatch.delenv('TOKBOOK_STATIC', raising=False)
    run(progress=True); out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and '4/9 steps' in err and '9 steps in' in err.split('\r')[-1]
    run(progress=False); assert capsys.readouterr() == ('', '')
    monkeypatch.setenv('TOKBOOK_STATIC', '1')
    run(progress=True); assert capsys.readouterr() == ('', '')

def test_workers_give_the_same_run(tmp_path):
    kw = dict(steps=9, valid=None, every=4)
    a = W.run(tmp_path/'a.safetensors', **kw)
    b = fit(W.net(), W.loss_fn, Batches(W.Noisy(), 8, workers=2), steps=9, lr=1e-2, wd=.1, clip=1., ema=.9, every=4)
    assert a.losses == b.losses
