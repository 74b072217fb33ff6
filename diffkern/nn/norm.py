"""GroupNorm with the scale-shift and the SiLU that follow it in diffusion U-Nets, in one op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffkern.ops import group_norm


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``, with the same parameters and state-dict keys, on `diffkern.ops.group_norm`.

    y = act(GN(cat([x, skip], 1) + offset)·(1 + scale) + shift), statistics in float32, in the memory format of x.

    num_groups, num_channels, eps, affine: as in ``torch.nn.GroupNorm``.
    activation: None or "silu".
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, **factory)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """``input`` (N, C, …); ``scale``, ``shift`` and ``offset`` (N, C) of any stride, or None.

        With ``skip`` (N, C2, …), whose channels follow those of ``input`` (N, C1, …), C = C1 + C2.
        """
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            skip=skip,
            offset=offset,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
