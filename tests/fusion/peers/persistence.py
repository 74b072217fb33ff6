"""A stand-in for the class decorator with which EDM pickles its networks.

A pickle of a decorated class holds the source of the class's module. Where that source is at hand as a module, the
loaded object is of that module's class; elsewhere it is of a class in a module made from the source, which no import
finds.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
import uuid

source_by_module = {}
module_by_source = {}


def register(module, source):
    source_by_module[module], module_by_source[source] = source, module


def module_of(source):
    if source not in module_by_source:
        module = types.ModuleType(f"unpickled_source_{uuid.uuid4().hex}")
        sys.modules[module.__name__] = module
        register(module, source)
        exec(source, module.__dict__)
    return module_by_source[source]


def reconstruct(meta):
    """The object whose class name, source and state `meta` holds."""
    cls = getattr(module_of(meta["module_src"]), meta["class_name"])
    instance = cls.__new__(cls)
    instance.__setstate__(meta["state"])
    return instance


def persistent_class(original):
    """The module class `original` as a subclass of the same name that pickles with its module's source."""
    module = sys.modules[original.__module__]
    if module not in source_by_module:
        register(module, inspect.getsource(module))

    class Decorator(original):
        _orig_module_src = source_by_module[module]
        _orig_class_name = original.__name__

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = copy.deepcopy((args, kwargs))

        def __reduce__(self):
            origin = {"module_src": self._orig_module_src, "class_name": self._orig_class_name}
            return reconstruct, ({**origin, "state": self.__getstate__()},)

    Decorator.__name__ = original.__name__
    Decorator.__module__ = original.__module__
    return Decorator
