"""philox_normal on a GPU: writes each normal once and reads nothing, so that an H200 is busy with the instructions.

45 instructions a normal in float32, 34 in 16 bits (approximate logarithm and root, which their rounding hides).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._torch_draws import TorchDraws
from diffkern.ops._triton import launch
from diffkern.ops._triton.elementwise import counter_arguments, tiling, torch_arguments, torch_tiling
from diffkern.ops._triton.tile import normals, place
from diffkern.ops.philox_normal.op import empty_normals


@triton.jit(do_not_specialize=["seed", "draw"])
def philox_normal_kernel(
    out,
    seed,
    draw,
    samples,
    stream,
    blocks,
    size,
    channels,
    pixels,
    FAST: tl.constexpr,
    DRAWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, base, offsets, inside, counter, lane = place(
        tl.program_id(0), blocks, size, channels, pixels, BLOCK, ORDER, WIDTH
    )
    z = normals(counter, lane, n, seed, draw, samples, stream, DRAWS, SAMPLES, BLOCK, ORDER, FAST)
    tl.store(out + n * size + base + offsets, z, inside)


def philox_normal(
    shape: Sequence[int],
    seed: Tensor,
    draw: Tensor,
    samples: Tensor,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    out = empty_normals(shape, seed, dtype, channels_last)
    tiles = tiling(out, generates=True)
    launch.launch(
        philox_normal_kernel,
        tiles.programs,
        seed.device,
        num_warps=tiles.num_warps,
        out=out,
        **counter_arguments(seed, draw, samples, stream),
        **tiles.arguments,
        FAST=dtype != torch.float32,
    )
    return out


def torch_normal(like: Tensor, draws: TorchDraws) -> Tensor:
    """torch.randn_like(like) of a GPU's generator that stands at `draws`, to 1e-6 before rounding; `like` is dense."""
    out = torch.empty_like(like)
    tiles = torch_tiling(out, draws)
    launch.launch(
        philox_normal_kernel,
        tiles.programs,
        like.device,
        num_warps=tiles.num_warps,
        out=out,
        **torch_arguments(draws),
        **tiles.arguments,
        FAST=False,
    )
    return out


def philox_normal_unsupported(
    shape: Sequence[int], seed: Tensor, draw: Tensor, samples: Tensor, stream: int, dtype: torch.dtype, *rest: object
) -> str | None:
    if dtype == torch.float64:
        return "float64 is the reference's"
    return launch.unsupported_device(seed)
