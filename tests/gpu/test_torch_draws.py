"""torch.randn of a CUDA generator, made inside our kernels: torch's numbers, and its generator as torch leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.ops import q_sample, solver_step
from diffkern.ops._torch_draws import cuda_draws, cuda_threads
from tests.gpu.calls import PROCESS, TIMES, ddpm, randn

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIRST_THREE = [-0.92466259, -0.42534415, -2.6438457]  # of seed 0, on any NVIDIA GPU


def boundary() -> int:
    """From here on a thread of torch's has more than one element."""
    return cuda_threads(2**31, torch.device("cuda", torch.cuda.current_device()))


def drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    from diffkern.ops.philox_normal.triton import torch_normal

    draws = cuda_draws(like, generator)
    assert draws is not None, "this torch draws in another way"
    return torch_normal(like, draws)


def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    return tuple(torch.Generator("cuda").manual_seed(seed) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["12", "boundary − 1", "boundary", "boundary + 1", "4·boundary + 1", "10^7"])
def test_the_numbers_and_the_offset(size, dtype):
    at = boundary()
    sizes = {"12": 12, "boundary − 1": at - 1, "boundary": at, "boundary + 1": at + 1, "4·boundary + 1": 4 * at + 1}
    like = torch.empty(sizes.get(size, 10**7), dtype=dtype, device="cuda")
    ours, torchs = generators(2**40 + 3)
    for _ in range(2):  # the second from where the first left the generator
        mine, expected = drawn(like, ours), torch.empty_like(like).normal_(generator=torchs)
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        assert bool(((mine.double() - expected.double()).abs() <= 1e-6 + rounding * expected.double().abs()).all())
        assert torch.equal(ours.get_state(), torchs.get_state())


def test_seed_0_begins_as_everywhere():
    mine = drawn(torch.empty(12, device="cuda"), torch.Generator("cuda").manual_seed(0))
    assert torch.allclose(mine[:3].cpu(), torch.tensor(FIRST_THREE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", ["q_sample", "solver_step"])
def test_ops_with_a_generator_take_torchs_numbers(op, memory_format):
    x = randn(3, 8, 60, 50, seed=1).float().cuda().contiguous(memory_format=memory_format)
    tables, program, at = PROCESS.tables("cuda"), ddpm(), torch.tensor(TIMES, device="cuda")

    def call(**source: object) -> Tensor:
        if op == "q_sample":
            return q_sample(x, at, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, **source)
        return solver_step(x, x, program, 5, **source)

    ours, torchs = generators(5)
    expected = call(noise=torch.empty_like(x).normal_(generator=torchs))
    assert torch.allclose(call(generator=ours), expected, rtol=0, atol=2e-6)
    assert torch.equal(ours.get_state(), torchs.get_state())


def test_a_view_that_is_not_dense_is_drawn_by_torch():
    generator = torch.Generator("cuda").manual_seed(1)
    assert cuda_draws(torch.empty(4, 6, device="cuda")[:, ::2], generator) is None
    assert cuda_draws(torch.empty(4, 6, dtype=torch.float64, device="cuda"), generator) is None
