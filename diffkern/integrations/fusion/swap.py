"""Changing the class of a module and back.

A fused block is the very module it was, of a subclass of its class: parameters, buffers, hooks and every attribute stay
where they are, and what is overridden is one method. Nothing is patched into the instance, so that it can be copied,
pickled, wrapped and compiled as before.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

_CLASSES: dict[tuple[type, type], type] = {}


class Fused(nn.Module):
    """The first base of every class that is swapped in; the second is `origin`, which it takes the place of.

    Where `origin` can be imported here, the class is written out in a module; otherwise `fused_class` makes it, and its
    instances are pickled as the method and the class that it is made of.
    """

    origin: ClassVar[type[nn.Module]]

    if TYPE_CHECKING:  # the attributes are the origin's

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "origin" in cls.__dict__:
            _CLASSES[cls.__bases__[0], cls.origin] = cls
            cls.__name__ = cls.origin.__name__  # by which others look for blocks; pickle reads the qualified name

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        cls = type(self)
        if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
            return reduced
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (cls.origin, *arguments[1:])
        return (_rebuild, (cls.__bases__[0], function, arguments), *rest)


def _rebuild(method: type, function: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """What the origin's own pickling makes, as a fused module again."""
    module = function(*arguments)
    if not isinstance(module, Fused):
        module.__class__ = fused_class(method, type(module))
    return module


def fused_class(method: type, origin: type[nn.Module]) -> type[nn.Module]:
    """The class that is `origin` but for what `method`, a subclass of `Fused`, overrides; the same at every call."""
    made = _CLASSES.get((method, origin))
    if made is None:
        names = {"origin": origin, "__module__": method.__module__, "__doc__": origin.__doc__}
        made = type(origin.__name__, (method, origin), names)
    return made


def swap(module: nn.Module, method: type) -> None:
    """Make `module` one of `fused_class(method, type(module))`. Raises ``TypeError`` where Python cannot."""
    module.__class__ = fused_class(method, type(module))


def restore(module: nn.Module) -> None:
    """Give a fused module its own class back.

    Attributes that hold one of its methods, as accelerate's hooks hold the forward, get the origin's.
    """
    fused = type(module)
    module.__class__ = _unfused(fused)
    for key, held in vars(module).items():
        name = getattr(held, "__name__", "")
        if isinstance(held, MethodType) and held.__self__ is module and held.__func__ is getattr(fused, name, None):
            module.__dict__[key] = getattr(type(module), name).__get__(module)


def _unfused(cls: type) -> type:
    """The origin; of a class that torch derived from a fused one, as for parametrisations, one of it."""
    if "origin" in cls.__dict__:
        return cast(type[Fused], cls).origin
    bases = tuple(_unfused(base) if issubclass(base, Fused) else base for base in cls.__bases__)
    names = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, names)
