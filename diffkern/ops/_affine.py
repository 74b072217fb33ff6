"""The parameters of a normalisation, weight and bias (C,) and scale and shift (N, C): their checks and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._checks import check_like


def check_parameter(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    check_like(name, value, "x", x, shape)
    if value.dtype != x.dtype and (value.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{name} must have x's dtype {x.dtype} (or float32 with 16-bit x), got {value.dtype}")


def per_channel(name: str, value: Tensor, x: Tensor, channels: int) -> Tensor:
    """offset, scale or shift as a (N, C) view."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    samples = x.shape[0]
    if tuple(value.shape) != (samples, channels):
        ones = (1,) * (x.dim() - 2)
        if tuple(value.shape) not in ((samples, channels, *ones), (1, channels, *ones)):
            allowed = f"{(samples, channels)} or {(samples, channels, *ones)}"
            raise ValueError(f"{name} must have shape {allowed}, got {tuple(value.shape)}")
        value = value.reshape(value.shape[0], channels)
        value = value if value.shape[0] == samples else value.expand(samples, channels)
    check_parameter(name, value, x, (samples, channels))
    return value


def check_activation(activation: object) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')


def check_eps(eps: object) -> None:
    if not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What statistics and arithmetic are in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_samples(parameter: Tensor | None, absent: float, x: Tensor) -> Tensor:
    """A parameter as (N or 1, C) in the arithmetic's dtype, or a constant in its place."""
    if parameter is None:
        return torch.full((1, x.shape[1]), absent, dtype=statistics_dtype(x), device=x.device)
    parameter = parameter.to(statistics_dtype(x))
    return parameter if parameter.dim() == 2 else parameter.unsqueeze(0)


def over_pixels(parameter: Tensor, x: Tensor) -> Tensor:
    """(N or 1, C) with ones in place of x's further axes."""
    return parameter.reshape(parameter.shape + (1,) * (x.dim() - 2))


def empty_like_or_none(x: Tensor, parameter: Tensor | None) -> Tensor:
    """Room for a parameter's gradient: contiguous, or empty where there is no such parameter."""
    return x.new_empty(0) if parameter is None else torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device)
