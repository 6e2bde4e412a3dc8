"""What the kernel tests share: random cases, layouts, the second run under the interpreter, the compiler without a GPU.

A file of kernel tests checks both implementations: its tests call kernels with impl=IMPL, which is 'torch', and its `test_triton` calls `interpret(__file__)`, which runs
the file again in a process of its own where TRITON_INTERPRET=1 is set before Triton is imported. TOKBOOK_LONG=1 takes 200 random cases instead of 20."""
import os, subprocess, sys
import pytest, torch
from hypothesis import HealthCheck, settings, strategies as st

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
IMPL = 'triton' if INTERPRETED else 'torch'
U = 2**-24
cases = settings(max_examples=200 if os.environ.get('TOKBOOK_LONG') == '1' else 20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16] + [torch.float64]*(not INTERPRETED))
layouts = st.sampled_from(['plain', 'every second', 'transposed', 'expanded'])
size = lambda top: st.one_of(st.sampled_from([1, 2, 15, 16, 17, 64, 65, 127, 128, 129]), st.integers(1, top)).map(lambda n: min(n, top))

def randn(*shape, seed): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def lay(x, layout): # the same values, other strides
    if layout == 'every second': return torch.stack([x, x*0 + 7], -2).flatten(-3, -2)[..., ::2, :]
    if layout == 'transposed': return x.mT.contiguous().mT
    if layout == 'expanded' and x.shape[-2] > 1: return x[..., :1, :].expand(x.shape)
    return x

def interpret(file):
    "All tests of a file with impl='triton', under the interpreter."
    pytest.importorskip('triton')
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:xdist', '-p', 'no:cacheprovider', file], capture_output=True, text=True, env={**os.environ, 'TRITON_INTERPRET': '1'})
    assert r.returncode == 0, r.stdout[-6000:] + r.stderr[-2000:]
    assert 'passed' in r.stdout and not r.stdout.startswith('no tests')

def cubin(kernel, types, num_warps=4, **const): # types: pointer and scalar arguments by name, such as '*fp32', 'i32'; the rest are constants
    "Compile a kernel for a GPU that is not there, and return its PTX: what the interpreter lets pass (types that change in a loop, tiles too large) stops here."
    triton = pytest.importorskip('triton')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    sig = {a: types.get(a, 'constexpr') for a in kernel.arg_names}
    out = triton.compile(ASTSource(fn=kernel, signature=sig, constexprs=const), target=GPUTarget('cuda', 80, 32), options=dict(num_warps=num_warps, num_stages=2))
    assert out.asm['cubin'] and out.metadata.shared <= 99*1024 # what consumer GPUs have
    return out.asm['ptx']
