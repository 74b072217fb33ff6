"""Golden numbers of other libraries: the folder that DIFFKERN_GOLDEN names, or the subset in tests/golden."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(os.environ.get("DIFFKERN_GOLDEN") or Path(__file__).parent / "golden")


class Golden:
    """Arrays of one file by their key; a key outside the subset skips the test that asks for it."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FOLDER / f"{name}.npz")
        self.meta: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self:
            pytest.skip(f"{key} is not in {FOLDER}; DIFFKERN_GOLDEN may name the whole collection")
        return self.arrays[key]


@functools.cache
def load(name: str) -> Golden:
    """`name`.npz and `name`.json."""
    return Golden(name)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """max|a − b| / max|b|; NaN anywhere gives NaN, which no tolerance passes."""
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected.astype(np.float64)).max())
