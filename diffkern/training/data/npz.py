"""Images from one ``.npz`` file, in the layout of the sample files that the field exchanges."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from diffkern.training.data.base import ArrayImages

# Float images may overshoot [−1, 1] by the rounding of whoever wrote them, not by more.
_SLACK = 1e-3


class NpzImages(ArrayImages):
    """``images`` (or ``arr_0``) and, if there, ``labels`` (or ``arr_1``) of an ``.npz`` file.

    Images are uint8 (N, H, W, C), 0..255, or floating (N, C, H, W) in [−1, 1], with C = 1 or 3;
    labels are integers (N,) ≥ 0. Nothing is resized.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an ``.npz`` file or a truncated one; no images in it; a dtype, shape or
            value other than the above (the message names the array and the index).
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        images, labels = _read(path)
        super().__init__(_checked_images(images, path), _checked_labels(labels, len(images), path))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise ValueError("it holds one bare array; save it with numpy.savez")
            names = archive.files
            image_key = next((key for key in ("images", "arr_0") if key in names), None)
            label_key = next((key for key in ("labels", "arr_1") if key in names), None)
            if image_key is None:
                raise ValueError(f"it holds {names}, and neither 'images' nor 'arr_0'")
            return archive[image_key], archive[label_key] if label_key else None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as an .npz file of images: {error}") from error


def _checked_images(images: np.ndarray, path: Path) -> np.ndarray:
    what = f"{path}: images are {images.dtype} {images.shape}"
    channel_axis = 3 if images.dtype == np.uint8 else 1
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{what}; allowed: uint8 (N, H, W, C) or floating (N, C, H, W) in [-1, 1]")
    if images.ndim != 4 or images.shape[channel_axis] not in (1, 3):
        layout = "(N, H, W, C)" if images.dtype == np.uint8 else "(N, C, H, W)"
        raise ValueError(f"{what}; {images.dtype} images must be {layout} with C = 1 or 3")
    if images.size == 0:
        raise ValueError(f"{what}: there is no image in it")
    if images.dtype == np.uint8:
        return images.transpose(0, 3, 1, 2)
    # min and max carry a NaN, so that two numbers per image tell all three faults apart.
    low, high = images.min(axis=(1, 2, 3)), images.max(axis=(1, 2, 3))
    broken = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))
    if broken.size:
        raise ValueError(f"{path}: image {broken[0]} holds NaN or Inf ({broken.size} such images in all)")
    outside = np.flatnonzero((low < -1 - _SLACK) | (high > 1 + _SLACK))
    if outside.size:
        first = outside[0]
        raise ValueError(
            f"{path}: image {first} runs from {low[first]:g} to {high[first]:g}; floating images must be in [-1, 1]"
        )
    return images.astype(np.float32)


def _checked_labels(labels: np.ndarray | None, count: int, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}; they must be integers ({count},)")
    if labels.min() < 0:
        raise ValueError(f"{path}: label {int(labels.argmin())} is {labels.min()}; labels must be 0 or more")
    return labels
