"""What two modules must share for one comparison to speak for both."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Types, settings and shapes of `module` and all that it contains, without the values of tensors."""
    return tuple(
        (
            name,
            type(inner),
            tuple((key, tuple(p.shape)) for key, p in inner.named_parameters(recurse=False)),
            tuple(sorted((key, repr(value)) for key, value in vars(inner).items() if _is_setting(key, value))),
        )
        for name, inner in module.named_modules()
    )


def _is_setting(key: str, value: object) -> bool:
    if key.startswith("_") or key == "training":
        return False
    if isinstance(value, tuple | list):
        return all(isinstance(element, _PLAIN) for element in value)
    return isinstance(value, _PLAIN) or callable(value)
