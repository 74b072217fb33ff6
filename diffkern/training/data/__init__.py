"""Datasets for training: digits, image folders and ``.npz`` files, all as (image in [−1, 1], label)."""

from pathlib import Path
from typing import Literal

from diffkern.training.data.base import NO_LABEL, ImageDataset
from diffkern.training.data.digits import Digits
from diffkern.training.data.folder import ImageFolder
from diffkern.training.data.npz import NpzImages

__all__ = ["NO_LABEL", "Digits", "ImageDataset", "ImageFolder", "NpzImages", "Split", "open_data"]


Split = Literal["train", "heldout", "all"]


def open_data(source: str | Path, *, size: int = 32, channels: int = 3, split: Split | None = None) -> ImageDataset:
    """The dataset behind one word of the command line: "digits", an ``.npz`` file, or a folder.

    ``size`` and ``channels`` matter to folders alone: the others come with their own. ``split`` is one of the digits',
    None for all of them.

    Raises:
        FileNotFoundError: neither a dataset's name nor anything on disk.
        ValueError: a split of other data than the digits; else what the dataset raises.
    """
    if str(source) == "digits":
        return Digits(split or "all")
    if split is not None:
        raise ValueError(f"split={split!r}: only the digits have splits, not {source}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"data={str(source)!r}: neither 'digits' nor a folder or an .npz file that exists")
    return ImageFolder(path, size, channels) if path.is_dir() else NpzImages(path)
