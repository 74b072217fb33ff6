"""What `step` returns: diffusers' output class, with fields, keys and positions."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class SchedulerOutput(BaseOutput):
    """`prev_sample`, the next state (N, C, …); `pred_original_sample`, the x0 that the step saw, where it is known."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
