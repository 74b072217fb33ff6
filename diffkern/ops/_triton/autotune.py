"""DIFFKERN_AUTOTUNE=1: launch choices measured on the GPU at hand instead of foretold, and remembered on disk.

Without it a heuristic chooses. With it the first call of a kernel in a shape tries every candidate, which waits for the
GPU; what was fastest is kept for that GPU, Triton and diffkern in $XDG_CACHE_HOME/diffkern (~/.cache/diffkern).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from diffkern._version import __version__
from diffkern.ops._noise import capturing

Table = dict[str, dict[str, Any]]


def tuned(
    kernel: str,
    key: Sequence[object],
    candidates: Sequence[Any],
    default: Any,
    run: Callable[[Any], None],
    device: torch.device,
) -> Any:
    """The choice that `run` is to be called with: `default`, or the fastest of the candidates (dataclasses).

    `key` is what may make another choice the fastest: shape, dtype, layout. `run` must do the same when repeated. A
    candidate that cannot be compiled or launched is not chosen; that `default` cannot is the caller's to know.
    """
    if not enabled() or device.type != "cuda" or capturing(device):
        return default
    name = f"{kernel} {' '.join(map(str, key))}"
    path = cache_file(device)
    remembered = _table(path).get(name)
    for candidate in (default, *candidates):
        if asdict(candidate) == remembered:
            return candidate

    def of(candidate: Any) -> float:
        try:
            return seconds(functools.partial(run, candidate))
        except (TritonError, RuntimeError):  # as OutOfResources, and as the compiler's passes and the driver fail
            if candidate == default:
                raise
            return math.inf

    fastest = min((default, *candidates), key=of)
    _remember(path, name, asdict(fastest))
    return fastest


def enabled() -> bool:
    return os.environ.get("DIFFKERN_AUTOTUNE") == "1"


def seconds(run: Callable[[], None]) -> float:
    """The median of some calls on the GPU."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def cache_file(device: torch.device) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    about = f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}, diffkern {__version__}"
    return Path(base) / "diffkern" / f"autotune, {re.sub(r'[^ ,.0-9A-Za-z-]', '_', about)}.json"


@functools.cache
def _table(path: Path) -> Table:
    """What the file holds; nothing if there is none or it was damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(path: Path, name: str, choice: dict[str, Any]) -> None:
    """Adds a choice to those in memory and on disk; a disk that cannot be written costs the next process its time."""
    table = _table(path)
    table[name] = choice
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(table, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
