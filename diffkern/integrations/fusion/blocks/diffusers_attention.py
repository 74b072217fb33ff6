"""The attention of diffusers, with the norm before it and the residual behind. Nothing here imports diffusers.

What an ``Attention`` computes is its processor's affair, which may be exchanged at any time: it is computed here only
while that is the default one and nothing else is set that it would look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.integrations.fusion.blocks.diffusers import is_diffusers
from diffkern.integrations.fusion.method import Draw, FusedBlock
from diffkern.integrations.fusion.submodules import add_residual, has_kernel, is_plain, normalised
from diffkern.ops import attention

_DEFAULT = {"AttnProcessor", "AttnProcessor2_0"}
_PARTS = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")  # that are computed nowhere here


class AttentionMethod(FusedBlock):
    """``Attention``: over the pixels of an image, or over a sequence or its text in a transformer."""

    does = "attention without copies"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_diffusers(module, "Attention") and _is_default(module)

    @classmethod
    def effect(cls, module: Any) -> str:
        return f"GroupNorm, {cls.does}, residual in place" if module.group_norm is not None else cls.does

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        if module.group_norm is not None:
            return (draw(2, module.query_dim, 4, 4),)
        other = draw(2, 7, module.cross_attention_dim) if module.is_cross_attention else None
        return draw(2, 5, module.query_dim), other

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        if module.group_norm is not None:
            yield "group_norm", module.group_norm

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        # temb is for a spatial norm, which there is none of.
        more = attention_mask is not None or cross_attention_kwargs.keys() - {"temb"}
        if more or not (has_kernel(hidden_states) and _is_default(self)):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        h = x
        if self.group_norm is not None:
            h = normalised(self.group_norm, None, x.transpose(1, 2)).transpose(1, 2)
        h = h.contiguous()  # which else each of the projections would make for itself
        other = h if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(h), self.to_k(other), self.to_v(other)
        # The other default processor knows no scale but torch's own.
        scale = self.scale if type(self.processor).__name__ == "AttnProcessor" else None
        h = self.projected(attention(q, k, v, self.heads, scale=scale), x)
        return h.transpose(1, 2).unflatten(2, hidden_states.shape[2:]) if hidden_states.dim() == 4 else h

    def projected(self, h: Tensor, x: Tensor) -> Tensor:
        """The output's projection with the residual x, both (N, T, C)."""
        linear, dropout = self.to_out
        if self.residual_connection and is_plain(linear, nn.Linear) and _is_idle(dropout):
            h = F.linear(h.flatten(0, 1), linear.weight, linear.bias)  # of rank 2, as of 3 it were a view
            return add_residual(x.flatten(0, 1), h, True, self.rescale_output_factor).unflatten(0, x.shape[:2])
        h = dropout(linear(h))
        if self.residual_connection:
            return add_residual(h, x, False, self.rescale_output_factor)  # in h's strides, as the original
        return h if self.rescale_output_factor == 1.0 else h / self.rescale_output_factor


def _is_default(module: Any) -> bool:
    """Whether the processor is diffusers' default one, and computes what is computed here."""
    processor = type(module.processor)
    if processor.__name__ not in _DEFAULT or not processor.__module__.startswith("diffusers."):
        return False
    if any(getattr(module, part, None) is not None for part in _PARTS) or module.to_k is None:
        return False
    outputs = getattr(module, "to_out", None)
    return outputs is not None and len(outputs) == 2 and module.inner_kv_dim == module.inner_dim


def _is_idle(dropout: Any) -> bool:
    return is_plain(dropout, nn.Dropout) and (dropout.p == 0 or not dropout.training)


METHODS = (AttentionMethod,)
