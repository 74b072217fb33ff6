"""The option virtual_concat in EDM: decoders that do not concatenate.

The concatenation stands in the network's own ``forward``, so that is what is overridden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.integrations.fusion.blocks.edm import UNetBlockMethod
from diffkern.integrations.fusion.method import Draw, FusedBlock, computes_as
from diffkern.integrations.fusion.submodules import (
    formatted_for,
    has_kernel,
    has_no_hooks,
    is_plain_norm,
    normalised,
    split_conv,
)


class NetworkMethod(FusedBlock):
    """What the two networks share."""

    does = "virtual_concat: the first norms and the shortcuts read the skip connections where they lie"
    option = "virtual_concat"
    around_fused = True
    name: str
    parts: frozenset[str]

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not (computes_as(module, cls.name) and cls.parts <= set(module._modules)):
            return False
        return any(isinstance(layer, UNetBlockMethod) for layer in module.dec.values())

    @classmethod
    def example(cls, module: Any, draw: Draw) -> tuple[Any, ...]:
        halvings = sum(name.endswith("_down") and "aux" not in name for name in module.enc)
        first = next(iter(module.enc.values()))
        x = draw(2, first.in_channels, *[2 ** max(2, halvings)] * 2)
        labels = [None if m is None else draw(2, m.in_features) for m in (module.map_label, module.map_augment)]
        return x, draw(2), *labels

    @classmethod
    def bypassed(cls, module: Any) -> Iterator[tuple[str, nn.Module]]:
        if "out_norm" in module._modules:
            yield "out_norm", module.out_norm
        yield from ((f"dec.{name}", layer) for name, layer in module.dec.items() if "aux_norm" in name)

    def labelled(self, labels: Tensor) -> Tensor:
        """Without some of the labels, in training, so that the network learns to do without."""
        if not (self.training and self.label_dropout):
            return labels
        kept = torch.rand([len(labels), 1], device=labels.device) >= self.label_dropout
        return labels * kept.to(labels.dtype)


class DhariwalMethod(NetworkMethod):
    """``DhariwalUNet``."""

    name = "DhariwalUNet"
    parts = frozenset({"map_noise", "map_layer0", "map_layer1", "enc", "dec", "out_norm", "out_conv"})

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
        if not has_kernel(x):
            return super().forward(x, noise_labels, class_labels, augment_labels)
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self.labelled(class_labels))
        emb = F.silu(emb)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if _is_block(layer) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            x = layer(x, emb) if x.shape[1] == layer.in_channels else joined(layer, x, skips.pop(), emb)
        return self.out_conv(normalised(self.out_norm, F.silu, x))


class SongMethod(NetworkMethod):
    """``SongUNet``, with any of its encoders and decoders."""

    name = "SongUNet"
    parts = frozenset({"map_noise", "map_layer0", "map_layer1", "enc", "dec"})

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
        if not has_kernel(x):
            return super().forward(x, noise_labels, class_labels, augment_labels)
        emb = self.embedded(noise_labels, class_labels, augment_labels)
        x, skips = self.encoded(x, emb)
        return self.decoded(x, skips, emb)

    def embedded(self, noise_labels: Tensor, class_labels: Any, augment_labels: Any) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # sines and cosines exchanged
        if self.map_label is not None:
            emb = emb + self.map_label(self.labelled(class_labels) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encoded(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        aux = x  # the image, smaller at each level, or what has been made of it
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if _is_block(layer) else layer(x)
                skips.append(x)
        return x, skips

    def decoded(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        image: Any = None  # the sum of what the levels so far give to the output
        level: Any = None  # normalised, for this level's share
        for name, layer in self.dec.items():
            if "aux_up" in name:
                image = layer(image)
            elif "aux_norm" in name:
                level = normalised(layer, F.silu, x)
            elif "aux_conv" in name:
                image = layer(level) if image is None else layer(level) + image
            else:
                x = layer(x, emb) if x.shape[1] == layer.in_channels else joined(layer, x, skips.pop(), emb)
        return image


def joined(block: Any, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
    """block(cat([h, skip], 1), emb), without concatenating where calling the block would do nothing else."""
    if not (
        isinstance(block, UNetBlockMethod)
        and has_no_hooks(block)
        and is_plain_norm(block.norm0)
        and _can_split(block.skip)
        and h.dtype == skip.dtype
    ):
        return block(torch.cat([h, skip], dim=1), emb)
    h = formatted_for(skip, h)
    y = block.conv0(normalised(block.norm0, F.silu, h, skip=skip))
    return block.second_half(y, emb, lambda: split_conv(block.skip, h, skip))


def _can_split(conv: Any) -> bool:
    """Whether `conv` is EDM's 1×1 convolution, without resampling and with no one watching."""
    if type(conv).__name__ != "Conv2d" or isinstance(conv, nn.Conv2d) or not has_no_hooks(conv):
        return False
    return not (conv.up or conv.down) and conv.weight is not None and conv.weight.shape[-1] == 1


def _is_block(layer: nn.Module) -> bool:
    return any(kind.__name__ == "UNetBlock" for kind in type(layer).__mro__)


METHODS = (DhariwalMethod, SongMethod)
