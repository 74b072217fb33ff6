"""Images from a folder; the names of its subfolders are the classes."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffkern.training.data.base import NO_LABEL, ImageDataset, from_uint8
from diffkern.training.data.image import BadValues, image_suffixes, load_image

# Decoded once for the check, images stay in memory up to this size; above it they are decoded anew at each use.
_KEEP_BYTES = 1 << 30


class ImageFolder(ImageDataset):
    """Every image under ``root``, in sorted order, as (channels, size, size).

    The first level of subfolders gives the labels, numbered in sorted order; images lying
    directly in ``root`` have none. Files are chosen by their suffix (all that Pillow can open);
    hidden files and other suffixes are passed over. Each image is decoded once here, so that a
    broken one shows now and not in the middle of a training run: it is named in a warning and
    skipped, and a last warning gives the count.

    Args:
        root: the folder.
        size: height and width; see ``load_image`` for how other shapes are brought to it.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is not there, or not a folder.
        ValueError: no image under ``root``, or none that can be read; labelled and unlabelled
            images mixed; NaN or Inf in an image (names the file); ``size`` or ``channels`` out of range.
    """

    def __init__(self, root: str | Path, size: int, channels: int = 3) -> None:
        root = Path(root)
        if size < 1:
            raise ValueError(f"size={size}: it must be 1 or more")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: it may be 1 (grey) or 3 (RGB)")
        self.shape = (channels, size, size)
        paths = _find_images(root)
        classes = _class_names(paths, root)
        self.num_classes = len(classes) if classes else None
        self._kept: np.ndarray | None = None
        self.paths = self._check(paths, root)
        names = {name: label for label, name in enumerate(classes)}
        self.labels = [names[p.relative_to(root).parts[0]] if names else NO_LABEL for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self._load(self.paths[index]) if self._kept is None else self._kept[index]
        return from_uint8(torch.from_numpy(pixels)), self.labels[index]

    def _load(self, path: Path) -> np.ndarray:
        return load_image(path, size=self.shape[1], channels=self.shape[0])

    def _check(self, paths: list[Path], root: Path) -> list[Path]:
        """Decode every file; return those that can be read, keeping their pixels if they are few."""
        from tqdm import tqdm

        keep = len(paths) * int(np.prod(self.shape)) <= _KEEP_BYTES
        kept = np.empty((len(paths) if keep else 0, *self.shape), np.uint8)

        def decode(index: int) -> str | None:
            try:
                pixels = self._load(paths[index])
            except BadValues:
                raise
            except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, …
                return f"{paths[index]}: skipped, it cannot be read as an image: {error}"
            if keep:
                kept[index] = pixels
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bar = tqdm(pool.map(decode, range(len(paths))), "checking images", len(paths), delay=2, leave=False)
            faults = list(bar)
        for fault in filter(None, faults):
            warnings.warn(fault, stacklevel=3)
        good = [index for index, fault in enumerate(faults) if fault is None]
        if not good:
            raise ValueError(f"{root}: none of its {len(paths)} image files can be read")
        if len(good) < len(paths):
            skipped = len(paths) - len(good)
            warnings.warn(f"{root}: {skipped} of {len(paths)} image files could not be read", stacklevel=3)
        if keep:
            self._kept = kept if len(good) == len(paths) else kept[good]
        return [paths[index] for index in good]


def _find_images(root: Path) -> list[Path]:
    if not root.exists():
        raise FileNotFoundError(f"{root}: there is no such folder")
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: it is not a folder")
    suffixes = image_suffixes()
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # A link that leads back up would otherwise be walked until the system's limit on links.
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"{root}: no image files in it or below it")
    return sorted(found)


def _class_names(paths: list[Path], root: Path) -> list[str]:
    loose = [path for path in paths if path.parent == root]
    if len(loose) == len(paths):
        return []
    if loose:
        raise ValueError(
            f"{root}: {len(loose)} images lie directly in it (such as {loose[0].name}) and {len(paths) - len(loose)} "
            "in subfolders: put all of them into subfolders (one a class), or all of them directly into it (no labels)"
        )
    return sorted({path.relative_to(root).parts[0] for path in paths})
