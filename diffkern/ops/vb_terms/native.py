"""vb_terms through csrc/cpu/vb_terms.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import float32_dense, is_channels_last, sample_shape
from diffkern.ops._native import counter_source, cpu_only, num_threads, optional_operand, output_like


def vb_terms(*arguments: Any) -> Tensor:
    return _run(None, *arguments)


def vb_terms_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    grad = output_like(arguments[0])
    return _run(grad, *arguments), grad


def _run(
    grad: Tensor | None,
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    draw: Tensor | None,
    samples: Tensor | None,
    stream: int,
    target: str,
    x0_in_target: bool,
    learned: bool,
    stops_mean: bool,
    levels: int,
    decoder: str,
    clip: list[float] | None,
    scale: Tensor | None = None,
) -> Tensor:
    """The terms; their gradient goes into `grad`, if that is given, times `scale`."""
    module = native_module()
    channels_last = is_channels_last(model_output)
    channels = model_output.shape[1] // 2 if learned else None
    mean, variance = _halves(model_output, channels)
    shape = (*sample_shape(mean)[:3], channels_last)
    read = [float32_dense(value, channels_last) for value in (mean, variance, x0, noise)]
    written = [None] * 2 if grad is None else [_buffer(part, channels_last) for part in _halves(grad, channels)]
    t, coefficients = t.contiguous(), coefficients.contiguous()
    scale = None if scale is None else scale.contiguous()
    source = None
    if seed is not None:
        assert draw is not None and samples is not None
        samples = samples.contiguous()
        source = counter_source(seed, draw, samples, stream)
    terms = model_output.new_empty((shape[0], 3), dtype=torch.float32)
    partial_sums = model_output.new_empty(3 * shape[0] * module.sample_parts, dtype=torch.float64)
    operands = [optional_operand(value) for value in read]
    module.vb_terms(
        shape=shape,
        mean=operands[0],
        variance=operands[1],
        x0=operands[2],
        y=operands[3],
        source=source,
        reads_y=noise is not None or source is not None,
        x0_in_target=x0_in_target,
        mean_of_x0=target != "x_prev",
        stops_mean=stops_mean,
        t=t.data_ptr(),
        coefficients=coefficients.data_ptr(),
        num_timesteps=coefficients.shape[0],
        levels=levels,
        exact=decoder == "exact",
        clip=clip,
        scale=None if scale is None else (scale.data_ptr(), scale.dim() > 1),
        partial_sums=partial_sums.data_ptr(),
        terms=terms.data_ptr(),
        grad_mean=optional_operand(written[0]),
        grad_variance=optional_operand(written[1]),
        num_threads=num_threads(model_output.numel()),
    )
    if grad is not None and channels_last:
        for part, result in zip(_halves(grad, channels), written, strict=True):
            if part is not None and result is not None and result.data_ptr() != part.data_ptr():
                part.copy_(result.movedim(-1, 1))
    return terms


def _halves(x: Tensor, channels: int | None) -> tuple[Tensor, Tensor | None]:
    """The mean's channels and the variance's, if there are any."""
    return (x, None) if channels is None else (x[:, :channels], x[:, channels:])


def _buffer(part: Tensor | None, channels_last: bool) -> Tensor | None:
    """Where the kernel writes a part of the gradient: the part itself, or for half the channels of channels last,
    which do not lie together, memory of its own."""
    if part is None:
        return None
    dense = part.movedim(1, -1) if channels_last else part
    if not channels_last or dense.is_contiguous():
        return dense
    return torch.empty_like(dense, memory_format=torch.contiguous_format)


def vb_terms_unsupported(model_output: Tensor, *rest: object) -> str | None:
    if model_output.dtype == torch.float64:
        return "float64 arithmetic is the reference's"
    return cpu_only(model_output)


vb_terms_and_grad_unsupported = vb_terms_unsupported
