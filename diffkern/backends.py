"""Which backends exist here and, if not, why; which one an op uses.

`reference` is plain PyTorch and runs anywhere. `native` is the C++ module for CPU tensors; `triton` are the kernels for
CUDA tensors, which Triton's interpreter can run on CPU tensors (TRITON_INTERPRET=1, and asked for by name). `sdpa` is
torch's own scaled_dot_product_attention, for attention alone. Which one an op takes is decided per call from its order
of preference; `use_backend` or the environment variable DIFFKERN_BACKEND
override that, and then a backend that cannot run raises instead of falling back.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAMES = ("reference", "native", "triton", "sdpa")


def _checked(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_forced: str | None = (
    _checked(os.environ["DIFFKERN_BACKEND"], "DIFFKERN_BACKEND") if os.environ.get("DIFFKERN_BACKEND") else None
)


def forced_backend() -> str | None:
    """The backend asked for by name, or None while the choice is automatic."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op use the backend `name` ("reference", "native", "triton" or "sdpa") inside the block, in all
    threads.

    Raises ValueError for an unknown name. An op that the backend cannot run raises RuntimeError with the reason.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "backend")
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("diffkern._cpu")
    except ImportError as error:
        recorded = Path(__file__).with_name("_build_failure.txt")
        return None, recorded.read_text().strip() if recorded.exists() else f"diffkern._cpu does not import: {error}"
    module.set_parallel(_openmp_entry())
    return module, ""


def _openmp_entry() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch itself uses, or 0 where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


def native_module() -> ModuleType:
    """The C++ module; raises RuntimeError with the reason where it is missing."""
    module, reason = _load_native()
    if module is None:
        raise RuntimeError(reason)
    return module


@functools.cache
def _load_eager() -> ModuleType | None:
    module = _load_native()[0]
    return module if module is not None and module.use_torch(torch) else None


def eager_native() -> ModuleType | None:
    """The C++ module if it can look into torch's tensors itself and no other backend is asked for.

    For calls of which Python would be the larger part.
    """
    return _load_eager() if _forced is None or _forced == "native" else None


def unavailable(name: str) -> str | None:
    """None if the backend exists on this machine, otherwise why it does not."""
    if name in ("reference", "sdpa"):
        return None
    if name == "native":
        return _load_native()[1] or None
    return _load_triton()


@functools.cache
def _load_triton() -> str | None:
    """Why Triton cannot be used on this machine, or None; a call may have reasons of its own."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises anything
        return f"triton does not import: {error}"
    if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes") or torch.cuda.is_available():
        return None
    return "torch finds no CUDA device (TRITON_INTERPRET=1 would interpret the kernels on a CPU)"


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """One line: the backend that `diffkern.ops.<op>(*args, **kwargs)` takes now, and why not the ones before it.

    Without arguments it speaks of the machine only. Raises ValueError for an unknown op.
    """
    from diffkern.ops import _registry

    return _registry.explain(op, args, kwargs)
