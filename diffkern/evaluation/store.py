"""The arrays of an evaluation on the disk, from which a killed one goes on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffkern.models.atomic import atomic_write

Arrays = dict[str, np.ndarray]
_DONE, _SETTINGS = "done", "settings"


class Store:
    """One ``.npz`` file: the arrays, how many of their entries are done, and the settings that they belong to.

    Args:
        path: of the file; its folder is made.
        settings: JSON values. Arrays of other settings are refused.
        resume: whether to go on from a file that exists.

    Raises:
        FileExistsError: the file exists and `resume` is False.
        ValueError: it exists, but belongs to other settings (they are named), or is no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.path, self.settings = path, dict(settings)
        self.found: tuple[int, Arrays] | None = None
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not resume:
            raise FileExistsError(f"{path}: holds an earlier evaluation: resume it, or choose another folder")
        else:
            self.found = self._load()

    def save(self, done: int, arrays: Arrays) -> None:
        """Replaces the file, entirely or not at all."""

        everything: dict[str, Any] = {_DONE: np.int64(done), _SETTINGS: json.dumps(self.settings), **arrays}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # given a name, numpy appends a suffix to it
                np.savez(file, **everything)

        atomic_write(self.path, write)

    def _load(self) -> tuple[int, Arrays]:
        try:
            with np.load(self.path) as file:
                arrays = {name: file[name] for name in file.files}
            done, stored = int(arrays.pop(_DONE)), json.loads(str(arrays.pop(_SETTINGS)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: not the arrays of an evaluation: {error}") from error
        now = json.loads(json.dumps(self.settings))
        names = sorted(name for name in now | stored if now.get(name) != stored.get(name))
        if names:
            differing = ", ".join(f"{name}={stored.get(name)!r}, not {now.get(name)!r}" for name in names)
            raise ValueError(f"{self.path}: belongs to an evaluation of other settings: {differing}")
        return done, arrays
