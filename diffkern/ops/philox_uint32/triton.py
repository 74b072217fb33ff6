"""philox_uint32 on a GPU: writes 8 bytes an element, and reads nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._triton import launch
from diffkern.ops._triton.elementwise import counter_arguments, tiling
from diffkern.ops._triton.tile import place, words


@triton.jit
def philox_uint32_kernel(
    out,
    seed,
    draw,
    samples,
    stream,
    blocks,
    size,
    channels,
    pixels,
    DRAWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, base, offsets, inside, counter, _ = place(tl.program_id(0), blocks, size, channels, pixels, BLOCK, ORDER, WIDTH)
    g0, g1, g2, g3 = words(counter, n, seed, draw, samples, stream, DRAWS, SAMPLES)
    g = tl.reshape(tl.join(tl.join(g0, g2), tl.join(g1, g3)), [BLOCK])
    tl.store(out + n * size + base + offsets, g.to(tl.int64), inside)


def philox_uint32(shape: Sequence[int], seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> Tensor:
    out = torch.empty(shape, dtype=torch.int64, device=seed.device)
    tiles = tiling(out, generates=False)
    launch.launch(
        philox_uint32_kernel,
        tiles.programs,
        seed.device,
        num_warps=tiles.num_warps,
        out=out,
        **counter_arguments(seed, draw, samples, stream),
        **tiles.arguments,
    )
    return out


def philox_uint32_unsupported(shape: Sequence[int], seed: Tensor, *rest: object) -> str | None:
    return launch.unsupported_device(seed)
