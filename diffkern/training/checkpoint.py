"""Checkpoints of a run: folders that appear whole or not at all.

    OUTPUT/checkpoints/step_00001000/   model.safetensors, ema.safetensors, process.json, training.pt

A checkpoint is written under a name that begins with a dot, flushed to the disk and renamed; one
that has to go is renamed to such a name before it is deleted. So every folder called ``step_…`` is
complete, whenever the process is killed, and the newest is simply the one with the highest number.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffkern.models.checkpoints import CheckpointError
from diffkern.process import GaussianProcess

MODEL, EMA, PROCESS, TRAINING = "model.safetensors", "ema.safetensors", "process.json", "training.pt"
_STATE = ("step", "losses", "order", "optimizer", "scaler", "generators")  # and "objective", in all but old ones
_NAME = re.compile(r"step_(\d{8,})")
_HALF_WRITTEN, _HALF_DELETED = ".writing-", ".deleting-"


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the run in ``output``, oldest first; empty if there are none."""
    folder = output / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """How many optimiser steps were done when ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of the run whose output folder it is.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(path)
    if (path / EMA).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path}: neither a checkpoint nor the output folder of a training run that has one")
    return found[-1]


def require_fresh(output: Path) -> None:
    """Raises FileExistsError if ``output`` already holds checkpoints: a new run would mix with the old one."""
    if found := list_checkpoints(output):
        raise FileExistsError(f"{output}: holds checkpoints up to {found[-1].name}: resume, or choose another folder")


def save_checkpoint(output: Path, step: int, files: Mapping[str, Callable[[Path], object]], keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``output``, then delete all but the ``keep`` newest.

    ``files`` maps each file's name to a function that creates it at the path it is given. Returns the new folder.

    Raises:
        OSError: a file could not be written, as on a full disk. What was written of it is removed, older
            checkpoints are untouched, and the message names the newest.
    """
    from safetensors import SafetensorError

    final = output / "checkpoints" / f"step_{step:08d}"
    partial = final.with_name(f"{_HALF_WRITTEN}{final.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, write in files.items():
            write(partial / name)
            _flush(partial / name)
        _flush(partial)
        os.rename(partial, final)
        _flush(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a failed write with an exception of its own, that carries the system's text alone.
        if isinstance(error, (OSError, SafetensorError)):
            raise _cannot_save(error, output, final) from error
        raise
    for old in list_checkpoints(output)[:-keep]:
        _delete(old)
    return final


def remove_leftovers(output: Path) -> None:
    """Delete what killed processes left half-written or half-deleted in ``output``."""
    for prefix in (_HALF_WRITTEN, _HALF_DELETED):
        for path in (output / "checkpoints").glob(f"{prefix}*"):
            shutil.rmtree(path)


def write_training_state(path: Path, state: Mapping[str, Any]) -> None:
    """The inverse of ``read_training_state``."""
    # Through memory: torch's own writer turns a full disk into an error that no longer says so.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path.write_bytes(buffer.getbuffer())


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    """The optimiser, the random number generators and the counters of ``checkpoint``, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, no such file, or lacks a part of the state.
    """
    path = checkpoint / TRAINING
    try:
        # weights_only: a checkpoint from elsewhere can hold tensors and numbers, but run no code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, OSError: torch.load promises none of them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated or not the state of a training run: {reason}") from error
    missing = [name for name in _STATE if not isinstance(state, dict) or name not in state]
    if missing:
        raise CheckpointError(f"{path}: not the state of a training run: it lacks {', '.join(missing)}")
    return state


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error


def describe_process(process: GaussianProcess, shape: Sequence[int]) -> dict[str, Any]:
    """The process and the images' (C, H, W) as values that JSON knows; Python's floats survive it exactly."""
    values: dict[str, Any] = {
        "shape": list(shape),
        "betas": process.betas.tolist(),
        "timestep_map": process.timestep_map.tolist(),
        "prediction": process.prediction,
        "variance": process.variance,
    }
    if process.eps_mean_square is not None:
        values["eps_mean_square"] = process.eps_mean_square.tolist()
    return values


def read_process(checkpoint: Path) -> tuple[GaussianProcess, tuple[int, int, int]]:
    """The process and the images' (C, H, W) of ``checkpoint``.

    Raises:
        CheckpointError: the file is missing or is none of ours.
    """
    path = checkpoint / PROCESS
    try:
        values = json.loads(path.read_text())
        channels, height, width = values.pop("shape")
        return GaussianProcess(**values), (channels, height, width)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the description of a diffusion process: {error}") from error


def _delete(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f"{_HALF_DELETED}{checkpoint.name}-{os.getpid()}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _cannot_save(error: Exception, output: Path, final: Path) -> OSError:
    kept = list_checkpoints(output)
    state = f"the checkpoint {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OSError(f"{final}: the checkpoint could not be written: {reason}; {state}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
