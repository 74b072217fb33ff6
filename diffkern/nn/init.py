"""How weights start."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def zero_init(module: ModuleT) -> ModuleT:
    """Set every parameter of ``module`` to zero, so that the residual branch it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
