"""Large outputs on a CPU lie in recycled memory: tensors like any other, and never two on the same memory."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from diffkern import backends
from diffkern.ops import solver_step
from diffkern.ops._memory import output_like
from diffkern.solvers import step_program

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DOUBLE = step_program({"c_x": [2.0]}, [0])

pytestmark = pytest.mark.skipif(
    backends.unavailable("native") is not None, reason="only the native module recycles memory"
)


def large(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "x",
    [
        large(64, 3, 64, 64),
        large(64, 3, 64, 64).contiguous(memory_format=torch.channels_last),
        large(1, 3, 512, 512).contiguous(memory_format=torch.channels_last),
        large(64, 64, 3, 64).transpose(1, 2),
        large(128, 3, 64, 64)[::2],
        large(2**18),
        large(8, 3, 64, 64)[:1],
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
def test_like_what_torch_makes(x, dtype):
    x = x.to(dtype)
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else True
    expected = torch.empty_like(x) if dense else torch.empty(x.shape, dtype=dtype)
    out = output_like(x.requires_grad_())
    assert (out.shape, out.stride(), out.dtype, out.device) == (x.shape, expected.stride(), dtype, x.device)
    assert not out.requires_grad
    out.fill_(3)
    assert out.double().sum() == 3 * x.numel()


def test_memory_comes_back_when_the_last_holder_is_gone():
    x = large(64, 3, 64, 64)
    first = output_like(x)
    address = first.data_ptr()
    view, array = first[1:], first.numpy()
    del first
    for holder in ("view", "array"):
        other = output_like(x)
        assert other.data_ptr() != address, f"{holder} still lies there"
        if holder == "view":
            del view
    del array, other
    gc.collect()
    assert address in {one.data_ptr() for one in [output_like(x) for _ in range(8)]}


def test_results_that_are_kept_keep_their_values():
    """A run whose every state is looked at afterwards, beside others that come and go."""
    x = torch.ones(64, 3, 64, 64)
    kept = []
    with torch.no_grad():
        for step in range(12):
            x = solver_step(x, x, DOUBLE, 0)
            solver_step(x, x, DOUBLE, 0)
            if step % 3 == 0:
                kept.append((step, x, x[3:].permute(1, 0, 2, 3)))
    for step, state, view in kept:
        assert (state == 2.0 ** (step + 1)).all()
        assert (view == 2.0 ** (step + 1)).all()


def test_threads_do_not_meet():
    wrong = []

    def work(number):
        x = torch.full((64, 3, 64, 64), float(number))
        for _ in range(30):
            results = [solver_step(x, x, DOUBLE, 0) for _ in range(3)]
            wrong.extend(number for result in results if not (result == 2 * number).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_is_a_tensor_like_any_other():
    x = large(64, 3, 64, 64)
    with torch.no_grad():
        out = solver_step(x, x, DOUBLE, 0)
    np.testing.assert_array_equal(out.numpy(), 2 * x.numpy())
    assert torch.equal(out.clone().add_(1), 2 * x + 1)
    shared = out.share_memory_()
    assert torch.equal(shared, 2 * x)
    with torch.inference_mode():
        inference = output_like(x)
        assert inference.is_inference()
    out = output_like(x).copy_(x)
    out.requires_grad_()
    (out**2).sum().backward()
    assert torch.equal(out.grad, 2 * x)


def test_small_and_huge_ones_are_not_kept():
    native = backends.native_module()
    assert not native.recyclable(2**18 - 4)
    assert not native.recyclable(2**25 + 4)
    before = native.recycled_bytes()
    for x in (large(100), torch.empty(2**23 + 1)):
        output_like(x)
    assert native.recycled_bytes() == before
    for _ in range(3):
        held = [output_like(torch.empty(2**23)) for _ in range(4)]
        del held
        assert native.recycled_bytes() <= 2**26
