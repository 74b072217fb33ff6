"""The option virtual_concat in guided-diffusion and improved-diffusion: decoders that do not concatenate.

The concatenation stands in the network's own ``forward``, so that is what is overridden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.integrations.fusion.blocks.guided_diffusion import ResBlockMethod
from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import (
    can_split,
    formatted_for,
    has_kernel,
    has_no_hooks,
    is_plain,
    is_plain_norm,
    normalised,
    residual,
    split_conv,
)


class UNetMethod(FusedBlock):
    """``UNetModel``: with ``input_blocks``, ``middle_block``, ``output_blocks`` and ``out``."""

    does = "virtual_concat: the first norms and the shortcuts read the skip connections where they lie"
    option = "virtual_concat"
    around_fused = True
    name = "UNetModel"

    embedding_of: Callable[..., Tensor]
    """Of the time: the function that the origin calls."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "origin" in cls.__dict__:
            cls.embedding_of = staticmethod(_timestep_embedding(cls.origin))

    @classmethod
    def recognises(cls, module: Any) -> bool:
        parts = {"time_embed", "input_blocks", "middle_block", "output_blocks", "out"}
        if not (computes_as(module, cls.name) and parts <= set(module._modules)):
            return False
        firsts = [block[0] for block in module.output_blocks if isinstance(block, nn.Sequential)]
        return _timestep_embedding(type(module)) is not None and any(isinstance(m, ResBlockMethod) for m in firsts)

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        weight = module.input_blocks[0][0].weight
        x = draw(2, weight.shape[1], *[_side(module)] * (weight.dim() - 2))
        return (
            x,
            torch.tensor([3, 500]),
            None if module.num_classes is None else torch.tensor([0, module.num_classes - 1]),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        if not self.takes(x, y):
            return super().forward(x, timesteps, y)
        return self.computed(x, timesteps, y)

    def takes(self, x: Tensor, y: Any) -> bool:
        """Whether it is computed here; the original knows what to say of labels that do not fit."""
        labelled = self.num_classes is None if y is None else self.num_classes is not None and y.shape == x.shape[:1]
        return has_kernel(x) and labelled

    def computed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        emb = self.time_embed(self.embedding_of(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.type(self.inner_dtype if hasattr(self, "inner_dtype") else self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = joined(block, h, skips.pop(), emb)
        return self.out(h.type(x.dtype))


class SuperResMethod(UNetMethod):
    """``SuperResModel``: whose input is joined to a smaller image, enlarged."""

    name = "SuperResModel"

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        x, timesteps, _ = super().example(module, draw)
        half = x.shape[1] // 2
        return x[:, :half], timesteps, draw(2, half, *(max(1, size // 2) for size in x.shape[2:]))

    @classmethod
    def example_keywords(cls, module: Any) -> dict[str, Any]:
        return {} if module.num_classes is None else {"y": torch.tensor([0, module.num_classes - 1])}

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Any = None, **kwargs: Any
    ) -> Tensor:
        y = kwargs.get("y")
        if kwargs.keys() - {"y"} or not self.takes(x, y):
            return super(UNetMethod, self).forward(x, timesteps, low_res, **kwargs)
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return self.computed(torch.cat([x, enlarged], dim=1), timesteps, y)


def joined(block: Any, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
    """block(cat([h, skip], 1), emb), without concatenating where calling its residual block would do nothing else."""
    first = block[0] if type(block).__name__ == "TimestepEmbedSequential" and has_no_hooks(block) else None
    if not (first is not None and _can_be_split(first) and h.dtype == skip.dtype == first.skip_connection.weight.dtype):
        return block(torch.cat([h, skip], 1), emb)
    layers = first.in_layers
    h = formatted_for(skip, h)
    y = layers[2](normalised(layers[0], layers[1], h, skip=skip))
    y = first.second_half(y, emb)
    h = residual(split_conv(first.skip_connection, h, skip), y, first.last_layer())
    for layer in list(block)[1:]:
        h = layer(h, emb) if _takes_embedding(layer) else layer(h)
    return h


def _can_be_split(block: Any) -> bool:
    """Whether a residual block may be given its input in two parts."""
    if not (isinstance(block, ResBlockMethod) and has_no_hooks(block) and "_forward" not in vars(block)):
        return False
    if getattr(block, "updown", False) or (getattr(block, "use_checkpoint", False) and torch.is_grad_enabled()):
        return False
    plain = is_plain(block.in_layers, nn.Sequential) and is_plain_norm(block.in_layers[0])
    return plain and can_split(block.skip_connection)


def _takes_embedding(layer: nn.Module) -> bool:
    return any(kind.__name__ == "TimestepBlock" for kind in type(layer).__mro__)


def _timestep_embedding(origin: Any) -> Any:
    """What ``timestep_embedding`` is where the network's class was written; None if nothing."""
    for kind in origin.__mro__:
        if kind.__name__ == UNetMethod.name:
            return getattr(kind.forward, "__globals__", {}).get("timestep_embedding")
    return None


def _side(module: Any) -> int:
    """Of an image that can be halved as often as the network does."""
    halvings = sum(any(type(m).__name__ == "Downsample" for m in block.modules()) for block in module.input_blocks)
    return 2 ** max(2, halvings)


METHODS = (UNetMethod, SuperResMethod)
