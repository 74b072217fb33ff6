"""guidance_rescale as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops._indices import per_sample
from diffkern.ops._layout import flat_samples


def guidance_rescale(model_output: Tensor, guidance_scale: Tensor, phi: float) -> Tensor:
    uncond, cond = flat_samples(model_output).double().chunk(2)
    if cond.shape[1] < 2 or cond.shape[0] == 0:
        return torch.ones(cond.shape[0], dtype=torch.float64, device=cond.device)
    guided = uncond + per_sample(guidance_scale, uncond) * (cond - uncond)
    return phi * _std(cond) / _std(guided) + (1 - phi)


def _std(values: Tensor) -> Tensor:
    """The unbiased deviation of each row; in two passes, which round less than torch.std's one, and of differences from
    the first value, which are exactly 0 where all are equal.
    """
    values = values - values[:, :1]
    deviation = values - values.mean(1, keepdim=True)
    return (deviation.square().sum(1) / (values.shape[1] - 1)).sqrt()


def guidance_rescale_unsupported(*args: object) -> None:
    return None
