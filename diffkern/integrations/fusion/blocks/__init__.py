"""The blocks that `fuse` knows, one file a codebase."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from torch import nn

from diffkern.integrations.fusion.blocks import (
    diffusers,
    diffusers_attention,
    diffusers_decoder,
    edm,
    edm_decoder,
    generic,
    guided_attention,
    guided_decoder,
    guided_diffusion,
    k_diffusion,
    lucidrains,
    lucidrains_attention,
    own,
    upsample,
)
from diffkern.integrations.fusion.method import FusedBlock

# Whole blocks before what they contain.
METHODS: tuple[type[FusedBlock], ...] = (
    *diffusers_decoder.METHODS,
    *diffusers.METHODS,
    *diffusers_attention.METHODS,
    *guided_decoder.METHODS,
    *guided_diffusion.METHODS,
    *guided_attention.METHODS,
    *edm_decoder.METHODS,
    *edm.METHODS,
    *lucidrains.METHODS,
    *lucidrains_attention.METHODS,
    *k_diffusion.METHODS,
    *own.METHODS,
    *upsample.METHODS,
    *generic.METHODS,
)


def methods_for(module: nn.Module) -> Iterator[type[FusedBlock]]:
    """The methods in the order in which they are to be tried."""
    if type(module).__module__.startswith("diffusers."):
        importlib.import_module("diffkern.integrations.fusion.blocks.diffusers_classes")
    yield from METHODS
