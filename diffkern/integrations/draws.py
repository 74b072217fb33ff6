"""Noise for the drop-in classes: the numbers that the replaced code would draw, or a counter's.

`noise="torch"` draws what torch would, in its order (on a CPU on several threads, to the bit). `noise="philox"` draws
one number a call from the same generators and makes the noise from it where it is used (docs/noise.md): faster, as
repeatable, and other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.ops import philox_normal
from diffkern.ops._torch_draws import normal_like, skip_normal_like

NOISE = ("torch", "philox")
Generators = torch.Generator | Sequence[torch.Generator] | None

_SAMPLE_BITS = 48  # of a sample's index that the counter holds


def check_noise(noise: str) -> str:
    """`noise` itself; ValueError unless it is one of NOISE."""
    if noise not in NOISE:
        raise ValueError(f"noise is {noise!r}; it may be one of {', '.join(map(repr, NOISE))}")
    return noise


def randn_like(like: Tensor, generator: Generators = None) -> Tensor:
    """Unit normals of like's shape, dtype, device and memory format, as torch.randn_like draws them.

    Without a generator torch's default one of the device draws. A generator of the CPU draws there for any device. A
    list has one generator a sample.

    Raises ValueError for a list of another length, and for a generator of another device than the CPU or like's.
    """
    if isinstance(generator, Sequence):
        _check_generators(generator, like)
        draws = [randn_like(sample, one) for sample, one in zip(like.unbind(0), generator, strict=True)]
        return torch.stack(draws) if draws else torch.empty_like(like)
    if generator is None:
        if like.device.type != "cpu":
            return torch.randn_like(like)
        return normal_like(like, torch.default_generator)
    if generator.device.type == "cpu" and like.device.type != "cpu":
        return normal_like(torch.empty_like(like, device="cpu"), generator).to(like.device)
    if generator.device.type != like.device.type:
        raise ValueError(f"generator is on {generator.device}; it must be on the CPU or on {like.device}")
    return normal_like(like, generator)


def skip_randn_like(like: Tensor) -> None:
    """Leaves torch's default generator of like's device as `randn_like(like)` would: for a draw nobody looks at."""
    if like.device.type == "cpu":
        skip_normal_like(like, torch.default_generator)
    else:
        torch.randn_like(like)


def first_noise(noise: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """x_T: unit normals of `shape`, float32 and contiguous, from torch's default generator of the device.

    As `torch.randn(shape)` draws them, or with noise="philox" from a counter whose key is drawn.
    """
    if noise == "torch":
        return randn_like(torch.empty(tuple(shape), dtype=torch.float32, device=device))
    return philox_normal(shape, _draw_bits(None, 63).to(device), stream=1, device=device)


def noise_source(noise: str, like: Tensor, generator: Generators = None) -> dict[str, Any]:
    """The arguments by which `solver_step` gets the noise of one step: a tensor's, or a counter's.

    A counter's key is drawn anew for every step, so that nothing has to remember which steps were made; with a list of
    generators each sample's index is, so that a sample's noise is its own generator's in a batch of any size.
    """
    if noise == "torch":
        return {"noise": randn_like(like, generator)}
    if isinstance(generator, Sequence):
        _check_generators(generator, like)
        samples = [_draw_bits(one, _SAMPLE_BITS).to(like.device) for one in generator]
        return {"seed": 0, "samples": torch.stack(samples) if samples else 0}
    return {"seed": _draw_bits(generator, 63).to(like.device)}


def _draw_bits(generator: torch.Generator | None, bits: int) -> Tensor:
    """An int64 tensor () of uniform bits from the generator, on its device; nothing waits for it."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**bits - 1, (), generator=generator, device=device)


def _check_generators(generators: Sequence[torch.Generator], like: Tensor) -> None:
    if len(generators) != len(like):
        raise ValueError(f"generator is a list of {len(generators)}; it must have one for each of {len(like)} samples")
