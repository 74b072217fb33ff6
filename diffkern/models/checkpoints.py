"""A model in one file: safetensors, with the `UNetConfig` that builds it as JSON in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.models.atomic import atomic_write
from diffkern.models.unet import UNet, UNetConfig

_ARCHITECTURE = "diffkern.models.UNet"
_SHOWN = 5  # names of each kind in an error message


class CheckpointError(ValueError):
    """A file is no checkpoint, or not one of this model. The message names the file and what is wrong with it."""


def save_model(path: str | os.PathLike[str], model: UNet) -> None:
    """Write parameters, buffers and `model.config` to ``path``, atomically (see `atomic_write`).

    Tensors keep their dtype; the memory format is not kept (safetensors stores contiguous tensors). ``model`` is the
    bare `UNet`: unwrap DDP, `AveragedModel` and compiled modules first. Raises ``TypeError`` otherwise, and
    ``OSError`` if the file cannot be written; what ``path`` held before is then still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = getattr(model, "config", None)
    if not isinstance(config, UNetConfig):
        raise TypeError(f"model must be a diffkern.models.UNet, not {type(model).__name__}: unwrap it first")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"architecture": _ARCHITECTURE, "config": json.dumps(config.to_dict())}
    try:
        atomic_write(path, lambda temporary: save_file(state, temporary, metadata))
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{path}: cannot be written: {error}") from error


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> UNet:
    """Build the `UNet` that ``path`` holds, with its weights in the dtype they were saved in, in training mode.

    Draws no random numbers. Raises ``FileNotFoundError``; `CheckpointError` if the file is truncated or not
    safetensors, has no or a wrong configuration, or its tensors are not those of the configuration.
    """
    state, metadata = _read(Path(path), torch.device(device))
    if metadata.get("architecture") != _ARCHITECTURE or "config" not in metadata:
        raise CheckpointError(f"{path}: not written by diffkern.models.save_model (metadata: {sorted(metadata)})")
    try:
        config = UNetConfig.from_dict(json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be used: {error}") from error
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        model = UNet(config)
    load_state(model, state, str(path), assign=True)
    return model


def load_state(model: nn.Module, state_dict: Mapping[str, Any], source: str, *, assign: bool = False) -> None:
    """``model.load_state_dict`` that changes nothing unless every key and shape fits, and says what does not.

    ``source`` is named in the error: the file the tensors came from. ``assign`` as in ``load_state_dict``.
    Raises `CheckpointError` with the missing and unexpected keys and the differing shapes: the first few of each,
    and how many there are.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} is {_shape(state_dict[key])}, the model's is {_shape(own[key])}"
        for key in own
        if key in state_dict and _shape(state_dict[key]) != _shape(own[key])
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    problems = [_few(f"{len(items)} {kind}", items) for kind, items in found if items]
    if problems:
        raise CheckpointError(
            f"{source}: not a state of this {type(model).__name__} ({len(own)} tensors):\n  " + "\n  ".join(problems)
        )
    model.load_state_dict(state_dict, assign=assign)


def _read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the tensors of safe_open may be views into the mapped file.
            state = {key: file.get_tensor(key).to(device, copy=True) for key in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes): {error}") from error


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _few(title: str, items: Sequence[str]) -> str:
    more = f", … and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{title}: {', '.join(items[:_SHOWN])}{more}"
