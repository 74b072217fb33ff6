"""torch.randn of a CUDA generator, made by our kernel: here interpreted, against torch's scheme written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from diffkern.backends import use_backend
from diffkern.ops._torch_draws import TorchDraws, cuda_draws
from tests.ops import oracles
from tests.ops.cases import memory_format, randn, same_bits
from tests.ops.philox import philox
from tests.ops.test_registration import CASES

# torch.randn(12, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) on any NVIDIA GPU.
FIRST_TWELVE = [
    -0.92466259,
    -0.42534415,
    -2.6438457,
    0.14518388,
    -0.12086647,
    -0.57972564,
    -0.62285122,
    -0.32838709,
    -1.07454231,
    -0.36314407,
    -1.67105067,
    2.26550497,
]
SIGNAL, SIGMA = oracles.alphas_cumprod_tables()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu compares with torch itself")


def draws_of_torch(numel: int, draws: TorchDraws) -> np.ndarray:
    """float64: thread k's call c has the normals of elements 4·c·threads + k + threads·(0, 1, 2, 3).

    The uniform and the angle are cuRAND's, rounded to float32 where it rounds: next to u = 1 that shows.
    """
    calls = -(-numel // (4 * draws.threads))
    counters = np.zeros((calls, draws.threads, 4), dtype=np.uint64)
    position = np.array([draws.call + c for c in range(calls)], dtype=object)
    counters[..., 0] = (position % 2**32).astype(np.uint64)[:, None]
    counters[..., 1] = (position // 2**32).astype(np.uint64)[:, None]
    counters[..., 2] = np.arange(draws.threads)
    words = philox(draws.seed % 2**64, counters).astype(np.float32).astype(np.float64)
    u = (words[..., 0::2] * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    turn = np.float64(np.float32(2 * np.pi * 2.0**-32))
    v = (words[..., 1::2] * turn + turn / 2).astype(np.float32).astype(np.float64)
    r = np.sqrt(-2 * np.log(u))
    normals = np.stack([r * np.sin(v), r * np.cos(v)], axis=-1).reshape(calls, draws.threads, 4)
    return normals.transpose(0, 2, 1).reshape(-1)[:numel]


def torch_normal(like: torch.Tensor, draws: TorchDraws) -> torch.Tensor:
    from diffkern.ops.philox_normal import triton

    with use_backend("triton"):
        return triton.torch_normal(like, draws)


def test_first_twelve_values_of_seed_0():
    drawn = torch_normal(torch.empty(12), TorchDraws(seed=0, call=0, threads=256))
    assert torch.allclose(drawn, torch.tensor(FIRST_TWELVE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("numel", [1, 255, 256, 1024, 1025, 5000])
def test_threads_take_several_elements_and_calls(numel):
    draws = TorchDraws(seed=-(2**62) - 7, call=2**32 - 2, threads=256)
    drawn = torch_normal(torch.empty(numel), draws)
    np.testing.assert_allclose(drawn.numpy(), draws_of_torch(numel, draws), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_q_sample_with_torchs_draws_is_q_sample_with_torchs_noise(dtype, channels_last):
    """In the order of the tensor's memory, rounded to its dtype first as torch would have stored it."""
    from diffkern.ops.q_sample.triton import q_sample

    x0, t = randn(3, 5, 7, 6, dtype=dtype), torch.tensor([999, 0, 500])
    if channels_last:
        x0 = x0.contiguous(memory_format=torch.channels_last)
    draws = TorchDraws(seed=11, call=3, threads=512)
    noise = torch_normal(x0, draws)
    memory = noise.permute(0, 2, 3, 1).reshape(-1) if channels_last else noise.view(-1)
    exact = torch.tensor(draws_of_torch(memory.numel(), draws))
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert bool(((memory.double() - exact).abs() <= 1e-6 + exact.abs() * rounding).all())
    with use_backend("triton"):
        x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, None, None, None, None, 3, True, draws)
        expected, _ = q_sample(x0, t, SIGNAL, SIGMA, noise, None, None, None, 3, False)
    assert same_bits(eps, noise)
    assert same_bits(x_t, expected)
    assert memory_format(x_t) == memory_format(x0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["plain", "learned_range", "multistep"])
def test_solver_step_with_torchs_draws_is_solver_step_with_torchs_noise(name, channels_last):
    from diffkern.ops.solver_step.triton import solver_step

    _, arguments = CASES[f"solver_step {name} {'channels_last' if channels_last else 'contiguous'}"]
    x, *rest = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    rest[3] = torch.tensor(1)  # one row for all
    given, none = 9, [None] * 3
    draws = TorchDraws(seed=11, call=3, threads=256)
    noise = torch_normal(x, draws)
    with use_backend("triton"):
        expected = solver_step(x, *rest[:given], noise, *none[1:], *rest[given + 3 :])
        found = solver_step(x, *rest[:given], *none, *rest[given + 3 :], None, None, draws)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_elsewhere_torch_draws_itself():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert cuda_draws(torch.empty(12), generator) is None
    assert torch.equal(generator.get_state(), state)
