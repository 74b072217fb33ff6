"""The factor that gives guided outputs the deviation of the conditional ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._checks import check_floating
from diffkern.ops._registry import Op
from diffkern.ops._step_arguments import guidance_tensor
from diffkern.ops.guidance_rescale.backward import guidance_rescale_backward


def guidance_rescale(model_output: Tensor, guidance_scale: float | Tensor, phi: float) -> Tensor:
    """r_n = φ·std(c_n)/std(m_n) + 1 − φ with m = u + w·(c − u) (Lin et al. 2023, arXiv 2305.08891, eqs. 15 and 16).

    model_output: (2N, …) = [u; c], any floating dtype and strides; of a network with a learned variance the channels of
        the mean alone. guidance_scale: w, a number or a tensor () or (N,) on model_output's device.
    phi: φ in [0, 1].

    Returns float64 (N,). The deviations are unbiased, over all axes but the first, in float64 whatever the dtype, each
    joined from those of pieces of the sample, so that they are right beside any mean. 1 where a sample has fewer than
    two values, of which there is no deviation; NaN where neither c nor m varies. NaN or Inf in one sample stays in it.
    Gradients (docs/solver_step.md) flow to model_output. Raises ValueError or TypeError naming the argument.
    """
    check_floating("model_output", model_output)
    if model_output.shape[0] % 2:
        raise ValueError(f"model_output must be [u; c], an even number of samples, got {tuple(model_output.shape)}")
    if not isinstance(phi, int | float):
        raise TypeError(f"phi must be a number, got {type(phi).__name__}")
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must lie in [0, 1], got {phi}")
    scale = guidance_tensor(guidance_scale, model_output[: model_output.shape[0] // 2])
    if scale is None:
        raise TypeError("guidance_scale must be a number or a tensor, got NoneType")
    return OP(model_output, scale, float(phi))


def _fake(model_output: Tensor, guidance_scale: Tensor, phi: float) -> Tensor:
    return model_output.new_empty(model_output.shape[0] // 2, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    model_output, guidance_scale, ctx.phi = inputs
    ctx.save_for_backward(model_output, guidance_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    model_output, guidance_scale = ctx.saved_tensors
    return guidance_rescale_backward(model_output, guidance_scale, ctx.phi, grad), None, None


OP = Op(
    "guidance_rescale(Tensor model_output, Tensor guidance_scale, float phi) -> Tensor",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
