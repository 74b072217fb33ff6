"""The residual block of denoising-diffusion-pytorch and its two halves, in one, two or three dimensions.

The package defines them once in each of its files, and others have copied them: names and attributes tell them, not
modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import (
    add_residual,
    has_kernel,
    has_no_hooks,
    is_plain,
    is_plain_norm,
    norm_kind,
    normalised,
)


class ResnetMethod(FusedBlock):
    """``ResnetBlock``: two of `BlockMethod`, called as before, and the residual."""

    does = "residual in place"
    around_fused = True

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (computes_as(module, "ResnetBlock") and {"mlp", "block1", "block2", "res_conv"} <= set(module._modules)):
            return False
        if not (BlockMethod.recognises(module.block1) and BlockMethod.recognises(module.block2)):
            return False
        if ("class_emb" in inspect.signature(type(module).forward).parameters) != (cls is ClassResnetMethod):
            return False
        if module.mlp is None:
            return True
        # Where the embedding is added between the halves, as it once was, there are half as many.
        weight = getattr(module.mlp[-1], "weight", None) if isinstance(module.mlp, nn.Sequential) else None
        return weight is not None and weight.shape[0] == 2 * module.block1.proj.weight.shape[0]

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        (x, _) = BlockMethod.example(module.block1, draw)
        return (x,) if module.mlp is None else (x, draw(2, module.mlp[-1].weight.shape[1]))

    def forward(self, x: Tensor, time_emb: Tensor | None = None) -> Tensor:
        if not has_kernel(x):
            return super().forward(x, time_emb)
        return self.computed(x, time_emb)

    def computed(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        scale_shift = None
        if self.mlp is not None and embedding is not None:
            scale_shift = self.mlp(embedding)[(...,) + (None,) * (x.dim() - 2)].chunk(2, dim=1)
        h = self.block2(self.block1(x, scale_shift=scale_shift))
        return add_residual(self.res_conv(x), h, _returns_what_nobody_keeps(self.block2))


class ClassResnetMethod(ResnetMethod):
    """The one of classifier-free guidance, which concatenates an embedding of the class to that of the time."""

    def forward(self, x: Tensor, time_emb: Tensor | None = None, class_emb: Tensor | None = None) -> Tensor:
        if not has_kernel(x):
            return super(ResnetMethod, self).forward(x, time_emb, class_emb)
        given = [embedding for embedding in (time_emb, class_emb) if embedding is not None]
        return self.computed(x, torch.cat(given, dim=-1) if given and self.mlp is not None else None)


class BlockMethod(FusedBlock):
    """``Block``: convolution, RMSNorm over the channels (once a GroupNorm), scale and shift, SiLU, dropout."""

    does = "norm, time scale and shift, SiLU in one op"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (computes_as(module, "Block") and {"proj", "norm", "act"} <= set(module._modules)):
            return False
        return norm_kind(module.norm) is not None and getattr(module.proj, "weight", torch.empty(0)).dim() > 2

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        weight = module.proj.weight
        c_out, c_in = weight.shape[0], weight.shape[1] * getattr(module.proj, "groups", 1)
        ones = [1] * (weight.dim() - 2)
        side = 6 if c_out != 6 else 7  # a norm that multiplies by the width instead of the channels is to differ
        x = draw(2, c_in, *[side for _ in ones])
        return x, (draw(2, c_out, *ones), draw(2, c_out, *ones))

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        yield "norm", module.norm
        yield "act", module.act

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if not has_kernel(x):
            return super().forward(x, scale_shift)
        scale, shift = (None, None) if scale_shift is None else scale_shift
        h = normalised(self.norm, self.act, self.proj(x), scale=scale, shift=shift)
        return self.dropout(h) if "dropout" in self._modules else h


def _returns_what_nobody_keeps(block: nn.Module) -> bool:
    """Whether a sum may be written into what `block` returns.

    It may where that is the output of the op, of SiLU or of dropout, whose gradients need what they were given and not
    what they gave, and where no hook on the way has seen it.
    """
    if not (isinstance(block, BlockMethod) and has_no_hooks(block) and is_plain_norm(block.norm)):
        return False
    return is_plain(block.act, nn.SiLU) and is_plain(block._modules.get("dropout", block.act), nn.SiLU, nn.Dropout)


METHODS = (ResnetMethod, ClassResnetMethod, BlockMethod)
