"""Whether a diffusion's methods are the library's own: what is made of them may then be one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Methods = Mapping[str, Callable[..., Any]]


def methods_of(kind: type, *names: str) -> Methods:
    """The methods of that name in `kind`, as they are now."""
    return {name: getattr(kind, name) for name in names}


def overridden(diffusion: object, methods: Methods) -> bool:
    """Whether diffusion's class, or the object itself, has another one in the place of any of `methods`."""
    kind = type(diffusion)
    return any(getattr(kind, name) is not own for name, own in methods.items()) or not methods.keys().isdisjoint(
        diffusion.__dict__
    )
