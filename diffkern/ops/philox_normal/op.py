"""Standard normals as a function of counters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.ops._checks import FLOATING
from diffkern.ops._noise import check_stream, int64_scalar, samples_tensor, seed_tensor
from diffkern.ops._registry import Op


def philox_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normals of `shape` (N, …), each a function of (seed, draw, sample index, stream, element) alone.

    Philox4x32-10 (Salmon et al. 2011) and Box–Muller, layout version 1 (docs/noise.md): element i of a sample, counted
    in contiguous order whatever the memory format, takes word i mod 4 of the counter (i div 4, draw, sample, stream).
    So the values do not depend on how samples are batched, on threads or on the backend. float32 values lie within
    4 ulp of the exact function of the integers; float64 within a few ulp of libm's.

    shape: at least one dimension; the first is the sample axis.
    seed: int in [0, 2^64) or 0-d int64 tensor (its 64 bits are the key).
    draw: int or 0-d int64 tensor. samples: an int, the index of the first sample, or an int64 tensor (N,) of indices.
    stream: int in [0, 65536); 0 is for users (1–7 are the library's own: docs/noise.md).
    dtype: float32, bfloat16, float16 or float64. device: the seed's if it is a tensor, else torch's default.
    memory_format: contiguous_format, or channels_last / channels_last_3d for four / five dimensions.

    Raises ValueError or TypeError naming the argument.
    """
    shape = checked_shape(shape)
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    ranks = {torch.contiguous_format: None, torch.channels_last: 4, torch.channels_last_3d: 5}
    if memory_format not in ranks:
        raise ValueError(
            f"memory_format must be contiguous_format, channels_last or channels_last_3d, got {memory_format}"
        )
    if ranks[memory_format] not in (None, len(shape)):
        raise ValueError(f"memory_format {memory_format} needs {ranks[memory_format]} dimensions, got shape {shape}")
    counters = resolve_counters(shape, seed, draw, samples, stream, device)
    return OP(shape, *counters, stream, dtype, ranks[memory_format] is not None)


def checked_shape(shape: Sequence[int]) -> list[int]:
    """`shape` as a list; raises unless it is a sequence of ints with a sample axis and no negative size."""
    if not isinstance(shape, Sequence) or not all(isinstance(size, int | torch.SymInt) for size in shape):
        raise TypeError(f"shape must be a sequence of ints, got {shape!r}")
    sizes = list(shape)
    if not sizes or any(size < 0 for size in sizes):
        raise ValueError(f"shape must have at least one dimension and no negative size, got {tuple(sizes)}")
    return sizes


def resolve_counters(
    shape: Sequence[int],
    seed: int | Tensor,
    draw: int | Tensor,
    samples: int | Tensor,
    stream: int,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(seed, draw, samples) as int64 tensors on the device."""
    check_stream(stream)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    device = torch.device(device)
    return seed_tensor(seed, device), int64_scalar("draw", draw, device), samples_tensor(samples, shape[0], device)


def _fake(
    shape: Sequence[int],
    seed: Tensor,
    draw: Tensor,
    samples: Tensor,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return empty_normals(shape, seed, dtype, channels_last)


def empty_normals(shape: Sequence[int], seed: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The output's allocation: `shape`, on the seed's device."""
    if channels_last:
        return torch.empty([shape[0], *shape[2:], shape[1]], dtype=dtype, device=seed.device).movedim(-1, 1)
    return torch.empty(shape, dtype=dtype, device=seed.device)


OP = Op(
    "philox_normal(SymInt[] shape, Tensor seed, Tensor draw, Tensor samples, int stream, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    package=__package__,
    fake=_fake,
)
