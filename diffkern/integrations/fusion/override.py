"""Whether a method may take the place of a module's own functions.

What it overrides must take the arguments that the origin's takes, by the same names, or a call with one that is not
known would fail; and it must hide nothing of the origin's that only happens to have the same name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any

from torch import nn

from diffkern.integrations.fusion.method import FusedBlock
from diffkern.integrations.fusion.verify import NotTheSame

_ANY = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


def check_override(module: nn.Module, method: type[FusedBlock]) -> None:
    """Raises `NotTheSame` with the reason why `method` may not override what the class of `module` has."""
    for name in _defined_by(method):
        own = getattr(type(module), name, None)
        if own is None:
            continue
        if name in vars(module):
            raise NotTheSame(f"its {name} was replaced on the instance")
        override = getattr(method, name)
        if not (callable(own) and callable(override)):
            raise NotTheSame(f"its class has an attribute {name!r} that would be hidden")
        if not _takes_the_same(override, own):
            raise NotTheSame(f"its {name} takes other arguments: {inspect.signature(own)}")


def _defined_by(method: type[FusedBlock]) -> Iterator[str]:
    """The names that a class made of `method` has before those of its origin."""
    for kind in method.__mro__[: method.__mro__.index(nn.Module)]:
        yield from (name for name in vars(kind) if not name.startswith("__"))


def _takes_the_same(override: Callable[..., Any], own: Callable[..., Any]) -> bool:
    """Whether each call that suits `own` suits `override`."""
    names, kinds = _parameters(override)
    own_names, own_kinds = _parameters(own)
    if kinds >= _ANY:
        return own_names[: len(names)] == names
    return own_names == names and kinds >= own_kinds


def _parameters(function: Callable[..., Any]) -> tuple[list[str], set[Any]]:
    """The names of the parameters after self, and which of *args and **kwargs there are."""
    _, *parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in _ANY], {p.kind for p in parameters} & _ANY
