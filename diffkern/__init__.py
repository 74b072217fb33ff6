"""diffkern: fused kernels that make diffusion models faster without asking anyone to change codebase.

`import diffkern` is light: it imports no kernel, no optional package and touches no device. Names below and the
subpackages (`diffkern.ops`, `diffkern.process`, …) are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffkern._version import __version__ as __version__

if TYPE_CHECKING:
    from diffkern.backends import use_backend as use_backend
    from diffkern.integrations.fusion import FuseReport as FuseReport
    from diffkern.integrations.fusion import fuse as fuse
    from diffkern.integrations.fusion import unfuse as unfuse
    from diffkern.ops.philox_normal.reference import NOISE_LAYOUT_VERSION as NOISE_LAYOUT_VERSION
    from diffkern.sampling import Sampler as Sampler
    from diffkern.training import TrainConfig as TrainConfig
    from diffkern.training import Trainer as Trainer

_NAMES = {
    "FuseReport": "diffkern.integrations.fusion",
    "NOISE_LAYOUT_VERSION": "diffkern.ops.philox_normal.reference",
    "Sampler": "diffkern.sampling",
    "TrainConfig": "diffkern.training",
    "Trainer": "diffkern.training",
    "fuse": "diffkern.integrations.fusion",
    "unfuse": "diffkern.integrations.fusion",
    "use_backend": "diffkern.backends",
}
_SUBPACKAGES = ("backends", "models", "nn", "ops", "process", "sampling", "solvers", "training")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"diffkern.{name}")
    raise AttributeError(f"module 'diffkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_SUBPACKAGES])
