"""The conditioned norm, the residual block and the self-attention of k-diffusion. Nothing here imports k-diffusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as, of_any_size
from diffkern.integrations.fusion.submodules import add_residual, has_kernel, has_no_hooks, is_plain, residual
from diffkern.ops import attention_qkv, group_norm


class ConditionedResidualMethod(FusedBlock):
    """``ConditionedResidualBlock``, as ``ResConvBlock``: its modules in order, and the residual."""

    does = "residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (computes_as(module, "ConditionedResidualBlock") and {"main", "skip"} <= set(module._modules)):
            return False
        main = module.main
        if type(main).__name__ != "ConditionedSequential" or len(main) == 0:
            return False
        return AdaGNMethod.recognises(main[0]) and _ends_in_a_convolution(main)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        norms = [inner for inner in module.modules() if AdaGNMethod.recognises(inner)]
        channels = norms[0].mapper.weight.shape[0] // 2
        return draw(2, channels, 6, 6), {norm.cond_key: draw(2, norm.mapper.weight.shape[1]) for norm in norms}

    def forward(self, input: Tensor, cond: Any) -> Tensor:
        main = self.main
        if not (has_kernel(input) and has_no_hooks(main) and _ends_in_a_convolution(main)):
            return super().forward(input, cond)
        conditioned = any(kind.__name__ == "ConditionedModule" for kind in type(self.skip).__mro__)
        skip = self.skip(input, cond) if conditioned else self.skip(input)
        return add_residual(skip, main(input, cond), h_is_ours=True)


class AdaGNMethod(FusedBlock):
    """``AdaGN``: a GroupNorm without weights, whose scale and shift are a projection of one of the conditions."""

    does = "GroupNorm, scale and shift in one op"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        attributes = ("num_groups", "eps", "cond_key", "mapper")
        return computes_as(module, "AdaGN") and all(hasattr(module, name) for name in attributes)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        twice_the_channels, features = module.mapper.weight.shape
        return of_any_size(draw, twice_the_channels // 2, 3, 5), {module.cond_key: draw(3, features)}

    def forward(self, input: Tensor, cond: Any) -> Tensor:
        if not has_kernel(input) or cond[self.cond_key].shape[:-1] != input.shape[:1]:
            return super().forward(input, cond)
        scale, shift = self.mapper(cond[self.cond_key]).chunk(2, dim=-1)
        dtype = torch.promote_types(input.dtype, scale.dtype)
        return group_norm(input.to(dtype), self.num_groups, eps=self.eps, scale=scale.to(dtype), shift=shift.to(dtype))


class SelfAttentionMethod(FusedBlock):
    """``SelfAttention2d``: its norm is called with the condition, and its projections are."""

    does = "attention without copies, residual in place"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        parts = {"norm_in", "qkv_proj", "out_proj", "dropout"}
        if not (computes_as(module, "SelfAttention2d") and parts <= set(module._modules) and hasattr(module, "n_head")):
            return False
        return AdaGNMethod.recognises(module.norm_in)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        features = module.norm_in.mapper.weight.shape[1]
        return draw(2, module.qkv_proj.in_channels, 3, 5), {module.norm_in.cond_key: draw(2, features)}

    def forward(self, input: Tensor, cond: Any) -> Tensor:
        if not has_kernel(input) or self.dropout.p != 0:  # which drops weights of the attention, in evaluation too
            return super().forward(input, cond)
        qkv = self.qkv_proj(self.norm_in(input, cond)).flatten(2)
        h = attention_qkv(qkv, self.n_head, order="qkvhc").unflatten(2, input.shape[2:])
        return residual(input, self.out_proj(h), self.out_proj)


def _ends_in_a_convolution(main: Any) -> bool:
    """Whether a sum may be written into what `main` returns: a convolution's output, or that after dropout.

    The gradients of these need what they were given, or what was drawn, and not what they gave.
    """
    last = list(main)[-2:]
    if is_plain(last[-1], nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        last.pop()
    return bool(last) and is_plain(last[-1], nn.Conv1d, nn.Conv2d, nn.Conv3d)


METHODS = (ConditionedResidualMethod, SelfAttentionMethod, AdaGNMethod)
