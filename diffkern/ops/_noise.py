"""Where an op's noise comes from: a given tensor, a counter (seed, draw, samples, stream), or a torch.Generator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkern.ops._checks import check_device, check_like
from diffkern.ops._torch_draws import TorchDraws, cuda_draws, normal_like

if TYPE_CHECKING:
    from diffkern.ops._registry import Op


class Noise(NamedTuple):
    """Either `given` or the three counter tensors; all None for a call that makes no noise."""

    given: Tensor | None
    seed: Tensor | None
    draw: Tensor | None
    samples: Tensor | None


def resolve_noise(
    like: Tensor,
    name: str,
    *,
    noise: Tensor | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    draw: int | Tensor,
    samples: int | Tensor,
    stream: int,
) -> Noise:
    """Checks that exactly one source is given for `like` (called `name`) and turns counters into tensors.

    A generator draws here, as `torch.randn_like(like)` would: same dtype, same memory format.
    """
    sources = (noise is not None) + (seed is not None) + (generator is not None)
    if sources != 1:
        raise ValueError(f"exactly one of noise, seed and generator must be given, got {sources}")
    if noise is not None:
        check_like("noise", noise, name, like)
        return Noise(noise, None, None, None)
    if generator is not None:
        return Noise(normal_like(like, generator), None, None, None)
    check_stream(stream)
    return Noise(
        None,
        seed_tensor(seed, like.device),
        int64_scalar("draw", draw, like.device),
        samples_tensor(samples, like.shape[0], like.device),
    )


def draws_in_kernel(op: Op, arguments: Sequence[Any], like: Tensor, generator: torch.Generator) -> TorchDraws | None:
    """The draws of torch.randn_like(like) if the op's Triton kernel can make them itself, the generator moved on.

    That is on a GPU, where no gradient is wanted: a backward pass would need them again.
    """
    if not like.is_cuda or not op.bypasses_autograd(arguments) or op.chosen(arguments) != "triton":
        return None
    return cuda_draws(like, generator)


def check_stream(stream: int) -> None:
    if not isinstance(stream, int) or not 0 <= stream < 2**16:
        raise ValueError(f"stream must be an int in [0, 65536), got {stream!r}")


def python_int(value: object) -> int | None:
    """An int, also from a NumPy integer; None for anything else, bools included."""
    if isinstance(value, Tensor | bool):
        return None
    return int(value) if isinstance(value, int | np.integer) else None


def seed_tensor(seed: object, device: torch.device) -> Tensor:
    """An int in [0, 2^64) or an int64 tensor () as a 0-d int64 tensor with the same 64 bits."""
    number = python_int(seed)
    if number is None:
        return _given("seed", seed, device, ((),))
    if not 0 <= number < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {number}")
    return _scalar(number if number < 2**63 else number - 2**64, device)


def int64_scalar(name: str, value: object, device: torch.device) -> Tensor:
    """A non-negative int or an int64 tensor () as a 0-d int64 tensor."""
    number = python_int(value)
    return _given(name, value, device, ((),)) if number is None else _scalar(_non_negative(name, number), device)


def samples_tensor(samples: object, count: int, device: torch.device) -> Tensor:
    """An int offset (0-d tensor) or an int64 tensor (N,) of sample indices."""
    number = python_int(samples)
    if number is None:
        return _given("samples", samples, device, ((), (count,)))
    return _scalar(_non_negative("samples", number), device)


def _non_negative(name: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} must lie in [0, 2**63), got {value}")
    return value


def _given(name: str, value: object, device: torch.device, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {str(value.dtype).removeprefix('torch.')}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
    check_device(name, value, "the data", torch.empty(0, device=device))
    return value


def _scalar(value: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or capturing(device):
        return torch.full((), value, dtype=torch.int64, device=device)
    return _cached_scalar(value, device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is made then is filled only when the graph runs."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=256)
def _cached_scalar(value: int, device: torch.device) -> Tensor:
    # Never handed out, so nobody can write to it; not an inference tensor, so autograd may save it.
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.int64, device=device)
