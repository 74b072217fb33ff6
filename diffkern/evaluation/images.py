"""The images of an evaluation: read once from end to end before it begins, then in slices."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# A pixel farther from its grey level than this part of the distance between two is none of them.
_OFF_LEVEL = 0.01
# What data sets without labels give for one.
_NO_LABEL = -1


class EvaluationImages:
    """A map-style data set of float images (C, H, W) in [−1, 1], or of (image, label); a tensor (N, C, H, W) is one.

    Reading it before the evaluation finds its faults before hours are spent.

    Args:
        data: the images.
        num_classes: the network's number of classes; None if it takes no labels, and those of the data are ignored.
        levels: how many grey levels [−1, 1] has; a warning is given if the pixels lie on others. None: not looked at.

    Attributes:
        shape: (C, H, W).
        digest: SHA-256 of pixels and labels, hexadecimal.
        mean_squares: mean(x0²) of each image, float64 (N,).

    Raises:
        ValueError: no images; an image that is not floating point (C, H, W), has another shape than the first one,
            holds NaN or a value outside [−1, 1]; a label that is missing or outside [0, num_classes). Names the index.
    """

    def __init__(self, data: Dataset | Tensor, num_classes: int | None, levels: int | None = None) -> None:
        self.data, self.num_classes = data, num_classes
        count = len(data)  # type: ignore[arg-type]  # Dataset does not declare it; map-style ones have it
        if count == 0:
            raise ValueError("data: there are no images")
        self.shape: tuple[int, ...] = ()
        self.shape = tuple(self._read(0)[0].shape)
        self.mean_squares = np.empty(count)
        digest = hashlib.sha256(repr(self.shape).encode())
        off_level = 0
        for index in range(count):
            image, label = self._read(index)
            self.mean_squares[index] = image.double().square().mean()
            digest.update(image.numpy().tobytes())
            digest.update(str(label).encode())
            if levels is not None:
                level = (image.double() + 1.0) * ((levels - 1) / 2.0)
                off_level += bool(((level - level.round()).abs() > _OFF_LEVEL).any())
        self.digest = digest.hexdigest()
        if off_level:
            warnings.warn(
                f"{off_level} of {count} images have pixels that are none of {levels} grey levels between -1 and 1: "
                "the bits/dim are those of the bins about them",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.mean_squares)

    def slice(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """The images `first` … `last` − 1 on the CPU, float32 (n, C, H, W), and their labels, int64 (n,), or None."""
        items = [self._read(index) for index in range(first, last)]
        labels = None if self.num_classes is None else torch.tensor([label for _, label in items])
        return torch.stack([image for image, _ in items]), labels

    def _read(self, index: int) -> tuple[Tensor, int | None]:
        item = self.data[index]
        image, label = item if isinstance(item, (tuple, list)) else (item, None)
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {index} of the data is {found}; it must be a floating tensor (C, H, W)")
        image = image.detach().to("cpu", torch.float32)
        if self.shape and tuple(image.shape) != self.shape:
            raise ValueError(f"image {index} of the data is {tuple(image.shape)}; the first one is {self.shape}")
        if not (image.abs() <= 1).all():
            raise ValueError(f"image {index} of the data holds NaN or values outside [-1, 1]")
        if self.num_classes is None:
            return image, None
        if label is None or not 0 <= int(label) < self.num_classes:
            given = "no label" if label in (None, _NO_LABEL) else f"label {int(label)}"
            raise ValueError(f"image {index} of the data has {given}; the model takes 0 to {self.num_classes - 1}")
        return image, int(label)
