"""What two modules must share for one comparison to speak for both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_OF_TORCH = frozenset(vars(nn.Module()))
_TOLD_BY_REPR = (bool, int, float, str, type(None), torch.dtype, torch.device)


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Types, settings and shapes of `module` and all that it contains, without the values of tensors."""
    return tuple(
        (
            name,
            type(inner),
            tuple((key, tuple(p.shape)) for key, p in inner.named_parameters(recurse=False)),
            tuple(sorted((key, _described(value)) for key, value in vars(inner).items() if key not in _OF_TORCH)),
        )
        for name, inner in module.named_modules()
    )


def _described(value: object) -> str:
    """The same for the same settings; of an object of which nothing is known, for that object only."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_described(element)}' for key, element in value.items())}}}"
    return repr(value) if isinstance(value, _TOLD_BY_REPR) or callable(value) else f"{type(value)} {id(value)}"
