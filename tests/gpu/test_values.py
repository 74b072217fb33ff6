"""Every op computes on a GPU what it computes on a CPU, forward and backward, by its reference and its kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.ops import philox_normal, philox_uint32
from tests.gpu.calls import CALLS, randn
from tests.ops.philox import exact_normals, ulps

pytestmark = pytest.mark.gpu

COUNTERS = {"seed": 2**64 - 3, "draw": 2**32 + 1, "samples": 2**32 - 1, "stream": 2}
# Of the largest value: float32 statistics and products, and 16-bit storage's rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FORMATS = [torch.contiguous_format, torch.channels_last]


def test_the_integers_are_equal():
    cpu = philox_uint32((5, 3, 7, 9), **COUNTERS, device="cpu")
    assert torch.equal(philox_uint32((5, 3, 7, 9), **COUNTERS, device="cuda").cpu(), cpu)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_normals_are_within_4_ulp_of_the_exact_ones(memory_format):
    shape, options = (64, 3, 33, 31), {**COUNTERS, "memory_format": memory_format}
    gpu = philox_normal(shape, **options, device="cuda")
    assert gpu.is_contiguous(memory_format=memory_format)
    words = philox_uint32((64, 3 * 33 * 31 + 1), **COUNTERS, device="cpu").numpy()
    exact = exact_normals(words).reshape(64, -1)[:, :-1].reshape(shape)
    assert ulps(gpu.cpu().numpy(), exact).max() <= 4


def test_ten_million_normals_are_within_4_ulp():
    for draw in range(10):
        words = philox_uint32((1, 10**6), 42, draw=draw, device="cuda").cpu().numpy()
        actual = philox_normal((1, 10**6), 42, draw=draw, device="cuda").cpu().numpy()[0]
        assert ulps(actual, exact_normals(words)).max() <= 4


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_values(name, memory_format, dtype):
    inputs, function, _ = CALLS[name]
    stored = {key: laid_out(value.to(dtype), memory_format) for key, value in inputs.items()}
    expected = function(**{key: value.double() for key, value in stored.items()})
    result = function(**{key: value.cuda() for key, value in stored.items()})
    assert result.device.type == "cuda"
    if result.dim() > 1:
        assert result.dtype == dtype
        assert result.dim() != 4 or result.is_contiguous(memory_format=memory_format)
    else:  # a loss per sample is not stored as the images are
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(result, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.differentiable])
def test_gradients(name):
    inputs, function, _ = CALLS[name]
    dy = randn(*function(**inputs).shape, seed=9)

    def gradients(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = {key: value.to(device, dtype).requires_grad_() for key, value in inputs.items()}
        return torch.autograd.grad(function(**leaves), list(leaves.values()), dy.to(device, dtype))

    exact = gradients("cpu", torch.float64)
    for key, gradient, expected in zip(inputs, gradients("cuda", torch.float32), exact, strict=True):
        assert relative(gradient, expected) <= 1e-5, key


@pytest.mark.parametrize("name", CALLS)
def test_two_runs_are_bitwise_equal(name):
    inputs, function, _ = CALLS[name]
    stored = {key: value.float().cuda() for key, value in inputs.items()}
    assert torch.equal(function(**stored), function(**stored))


def laid_out(value: Tensor, memory_format: torch.memory_format) -> Tensor:
    return value.contiguous(memory_format=memory_format) if value.dim() == 4 else value


def relative(actual: Tensor, exact: Tensor) -> float:
    difference = (actual.cpu().double() - exact).abs().max()
    assert not bool(difference.isnan())
    return float(difference / exact.abs().max())
