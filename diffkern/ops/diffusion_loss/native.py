"""diffusion_loss through csrc/cpu/diffusion_loss.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import float32_dense, sample_dense, sample_shape
from diffkern.ops._native import (
    counter_source,
    cpu_only,
    num_threads,
    operand,
    optional_operand,
    output_like,
)
from diffkern.ops.diffusion_loss.op import TARGETS


def diffusion_loss(*arguments: Any) -> Tensor:
    return _run(None, *arguments)


def diffusion_loss_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    grad = output_like(arguments[0])
    return _run(grad, *arguments), grad


def _run(
    grad: Tensor | None,
    model_output: Tensor,
    x0: Tensor | None,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    weight: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    draw: Tensor | None,
    samples: Tensor | None,
    stream: int,
    target: str,
    scale: Tensor | None = None,
) -> Tensor:
    """The loss; its gradient goes into `grad`, if that is given, times `scale`."""
    module = native_module()
    shape = sample_shape(model_output)
    channels_last = shape[3]
    signal, sigma = sqrt_alphas_cumprod.double().contiguous(), sqrt_one_minus_alphas_cumprod.double().contiguous()
    t = t.contiguous()
    weight = None if weight is None else weight.double().contiguous()
    scale = None if scale is None else scale.contiguous()
    model_output = sample_dense(model_output, channels_last)
    x0, noise = float32_dense(x0, channels_last), float32_dense(noise, channels_last)
    source = None
    if seed is not None:
        assert draw is not None and samples is not None
        samples = samples.contiguous()
        source = counter_source(seed, draw, samples, stream)
    loss = model_output.new_empty(shape[0], dtype=torch.float32)
    partial_sums = model_output.new_empty(shape[0] * module.sample_parts, dtype=torch.float64)
    module.diffusion_loss(
        shape=shape,
        target=TARGETS.index(target),
        model_output=operand(model_output),
        x0=optional_operand(x0),
        noise=optional_operand(noise),
        source=source,
        t=t.data_ptr(),
        sqrt_alphas_cumprod=signal.data_ptr(),
        sqrt_one_minus_alphas_cumprod=sigma.data_ptr(),
        num_timesteps=signal.shape[0],
        weight=None if weight is None else weight.data_ptr(),
        scale=None if scale is None else (scale.data_ptr(), scale.dim() > 0),
        partial_sums=partial_sums.data_ptr(),
        loss=loss.data_ptr(),
        grad=None if grad is None else operand(sample_dense(grad, channels_last)),
        num_threads=num_threads(model_output.numel()),
    )
    return loss


def diffusion_loss_unsupported(model_output: Tensor, *rest: object) -> str | None:
    if model_output.dtype == torch.float64:
        return "float64 arithmetic is the reference's"
    return cpu_only(model_output)


diffusion_loss_and_grad_unsupported = diffusion_loss_unsupported
