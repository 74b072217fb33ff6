"""Importing a package without some of what it imports: only parts that do not need the absent ones will work."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

import pytest


class Placeholder:
    """What any name imported from an absent package is; a class, so that it can be inherited from."""

    def __init__(self, *_, **__):
        raise ImportError("made from a package that is not installed")


class AbsentPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads an empty module for every name in the given packages."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Placeholder

        module.__getattr__ = attribute


@contextlib.contextmanager
def stand_ins(packages):
    """While it lasts, those of `packages` that are not installed import as empty modules; none is left afterwards."""
    finder = AbsentPackages({package for package in packages if importlib.util.find_spec(package) is None})
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in finder.packages]:
            del sys.modules[name]
        importlib.invalidate_caches()


def import_without(name, *, needs, absent):
    """The module `name`, imported with stand-ins for `absent`. Skips the test where its package or `needs` is missing.

    `needs` are imported before: what they look for, and may remember, is not to be a stand-in.
    """
    package = name.partition(".")[0]
    if name in sys.modules:
        return sys.modules[name]
    for module in needs:
        pytest.importorskip(module)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    before = set(sys.modules)
    try:
        with stand_ins(absent):
            return importlib.import_module(name)
    except BaseException:
        for half_made in [key for key in set(sys.modules) - before if key.partition(".")[0] == package]:
            del sys.modules[half_made]
        raise
