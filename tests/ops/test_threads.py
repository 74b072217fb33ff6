"""Threads: results do not depend on their number, several Python threads may call at once, and a fork does not hang."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffkern import backends
from diffkern.ops import (
    attention_qkv,
    channel_rms_norm,
    diffusion_loss_and_grad,
    dynamic_threshold,
    group_norm,
    guidance_rescale,
    linear_attention,
    philox_normal,
    philox_uint32,
    q_sample,
    solver_step,
)
from diffkern.process.gaussian import ProcessTables
from tests.ops import programs
from tests.ops.cases import in_layout, randn, same_bits
from tests.ops.test_q_sample import SIGMA, SIGNAL

pytestmark = pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")


def everything(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of every op on tensors that are large enough to be shared among threads."""
    x = in_layout(randn(*shape).to(dtype), layout).requires_grad_()
    t = torch.arange(shape[0]) * 100 % 1000
    scale = randn(shape[0], shape[1], seed=1).to(dtype).requires_grad_()
    y = group_norm(x, 4, torch.ones(shape[1], dtype=dtype), scale=scale, activation="silu")
    z = channel_rms_norm(x, torch.ones(shape[1], dtype=dtype), scale=scale, activation="silu")
    rows = x.flatten(2)[:, : 3 * (shape[1] // 6) * 2, :1100]
    a = attention_qkv(rows, 2)
    qkv = x.flatten(2).repeat(1, 3, 1)
    attended = linear_attention(qkv, 2, memory=randn(2, 2, shape[1] // 2, 4))
    data, tables = x.detach(), ProcessTables(SIGNAL, SIGMA)
    both = torch.cat([data, data.cos()])
    return [
        *diffusion_loss_and_grad(data, data.cos(), t, tables, scale=0.5, target="v", seed=3),
        *diffusion_loss_and_grad(data, data, t, tables, scale=0.5, noise=data.cos()),
        philox_uint32(shape, 3),
        philox_normal(shape, 3, dtype=dtype),
        q_sample(data, t, SIGNAL, SIGMA, seed=3),
        solver_step(data, data, programs.CLIPPED, 1, extra=data, seed=3),
        guidance_rescale(both, 2.0, 0.7),
        dynamic_threshold(data, both, programs.program(3, threshold=(0.9, 9.0)), 1, guidance_scale=2.0),
        y.detach(),
        *torch.autograd.grad(y, [x, scale], randn(*shape, seed=2).to(dtype)),
        a.detach(),
        *torch.autograd.grad(a, x, randn(*a.shape, seed=2).to(dtype)),
        z.detach(),
        *torch.autograd.grad(z, [x, scale], randn(*shape, seed=2).to(dtype)),
        attended.detach(),
        *torch.autograd.grad(attended, x, randn(*attended.shape, seed=2).to(dtype)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 20, 61, 67), (3, 8, 53, 59), (9, 64, 16, 16)])
def test_results_do_not_depend_on_the_number_of_threads(shape, layout, dtype):
    torch.set_num_threads(1)
    alone = everything(shape, layout, dtype)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(same_bits(a, b) for a, b in zip(everything(shape, layout, dtype), alone, strict=True))


def test_several_python_threads_at_once():
    """The GIL is released in the kernels, and nothing in them is shared."""
    torch.set_num_threads(2)
    expected = everything((3, 8, 53, 59), "contiguous", torch.float32)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(everything, (3, 8, 53, 59), "contiguous", torch.float32) for _ in range(12)]
        for future in futures:
            assert all(same_bits(a, b) for a, b in zip(future.result(), expected, strict=True))


def test_explain_in_one_thread_does_not_disturb_another():
    x = randn(2, 8, 16, 16)
    expected = group_norm(x, 2)
    with ThreadPoolExecutor(2) as pool:
        explained = [pool.submit(backends.explain, "group_norm", x, 2) for _ in range(300)]
        assert all(same_bits(group_norm(x, 2), expected) for _ in range(300))
        assert {future.result() for future in explained} == {"group_norm: native"}


FORK = """
import os, signal, sys, time
import torch
from diffkern.ops import group_norm, q_sample

torch.set_num_threads(2)
x0, t = torch.ones(8, 16, 64, 64), torch.arange(8)
tables = torch.linspace(1, 0, 10, dtype=torch.float64), torch.linspace(0, 1, 10, dtype=torch.float64)
(x0 * 2).sum()  # torch's own parallel region, too

def work():
    return q_sample(x0, t, *tables, seed=3), group_norm(x0, 4, activation="silu")

expected = [r.numpy().tobytes() for r in work()]
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        os._exit(0 if [r.numpy().tobytes() for r in work()] == expected else 1)
    children.append(child)
deadline = time.monotonic() + 5
for child in children:
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            for c in children:
                os.kill(c, signal.SIGKILL)
            sys.exit("a child made by fork() hangs")
        time.sleep(0.01)
    if os.waitstatus_to_exitcode(status):
        sys.exit("a child computed something else, or crashed")
assert [r.numpy().tobytes() for r in work()] == expected  # and the parent goes on
print("right")
"""


def test_a_child_made_by_fork_works(run_python):
    assert run_python(FORK, timeout=60, OMP_NUM_THREADS="2") == "right"


def test_kernels_share_the_threads_of_torch(run_python):
    """No second pool: the process has as many threads after our parallel region as after torch's."""
    code = """
import os, torch
from diffkern import backends
from diffkern.ops import q_sample
torch.set_num_threads(2)
x = torch.ones(8, 16, 64, 64)
(x * 2).sum()
before = len(os.listdir("/proc/self/task"))
q_sample(x, torch.zeros(8, dtype=torch.int64), torch.ones(1).double(), torch.ones(1).double(), seed=3)
print(backends.native_module().has_parallel(), len(os.listdir("/proc/self/task")) - before)
"""
    if not backends.native_module().has_parallel():
        pytest.skip("torch's OpenMP runtime was not found: kernels run serially")
    assert run_python(code) == "True 0"
