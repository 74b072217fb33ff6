"""guidance_rescale through csrc/cpu/guidance_rescale.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._layout import is_channels_last, sample_dense, sample_shape
from diffkern.ops._native import cpu_only, num_threads, operand


def guidance_rescale(model_output: Tensor, guidance_scale: Tensor, phi: float) -> Tensor:
    samples, channels, pixels, _ = sample_shape(model_output)
    samples //= 2
    if channels * pixels < 2:
        return model_output.new_ones(samples, dtype=torch.float64)
    # The order of the values does not matter, so long as it is that of both halves.
    model_output = sample_dense(model_output, is_channels_last(model_output))
    guidance_scale = guidance_scale.contiguous()
    rescale = model_output.new_empty(samples, dtype=torch.float64)
    native_module().guidance_rescale(
        shape=(samples, channels, pixels, False),
        uncond=operand(model_output[:samples]),
        cond=operand(model_output[samples:]),
        guidance_scale=guidance_scale.data_ptr(),
        guidance_per_sample=guidance_scale.dim() > 0,
        phi=phi,
        rescale=rescale.data_ptr(),
        num_threads=num_threads(model_output.numel()),
    )
    return rescale


def guidance_rescale_unsupported(model_output: Tensor, *rest: object) -> str | None:
    return cpu_only(model_output)
