"""What calls of a module leave behind: in attributes of it and of all that it contains, and in generators."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict)  # a subclass may refuse to be changed


class Attributes:
    """The attributes of a module and of all that it contains, and what its containers hold, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._of = [(name, m, vars(m).copy()) for name, m in module.named_modules()]
        values = [value for _, _, attributes in self._of for value in attributes.values()]
        self._contents = [(value, copy.copy(value)) for value in values if type(value) in _CONTAINERS]

    def changed(self) -> set[str]:
        """Names of those that have been assigned, or that hold something else."""
        held = {id(container) for container, contents in self._contents if _held(container) != _held(contents)}
        return {
            f"{name}.{key}".lstrip(".")
            for name, module, earlier in self._of
            for key in vars(module).keys() | earlier.keys()
            if vars(module).get(key, self) is not earlier.get(key, self) or id(earlier[key]) in held
        }

    def restore(self) -> None:
        """Gives all back."""
        for _, module, earlier in self._of:
            vars(module).clear()
            vars(module).update(earlier)
        for container, contents in self._contents:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(contents)


def _held(container: Any) -> Any:
    if isinstance(container, dict):
        return {key: id(value) for key, value in container.items()}
    ids = [id(value) for value in container]
    return set(ids) if isinstance(container, set) else ids


@contextmanager
def generators_kept() -> Iterator[None]:
    """Gives the states of Python's, NumPy's and torch's CPU generators back."""
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def seed_generators() -> None:
    """Starts them all anew. torch.manual_seed would seed accelerators' too."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
