"""Writing a file so that no reader, crash or full disk ever sees half of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Replace ``path`` with what ``writer`` writes, entirely or not at all.

    ``writer(temporary)`` is given the path of an empty file in the folder of ``path`` (a rename is atomic only within
    one file system) and overwrites it. It is flushed to the disk and renamed over ``path``, with the permissions of
    any new file. A process killed at any moment leaves either the old file or the new one under ``path``; at worst a
    temporary file stays behind beside it.

    Raises whatever ``writer`` raises (a full disk: ``OSError``); the temporary file is then removed and the old
    ``path`` is untouched. The folder must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        writer(temporary)
        temporary.chmod(mode)  # safetensors puts a file in its place that only the user may read
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too must not leave debris
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)  # the rename itself is an entry of the folder


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
