"""What every dataset here gives: an image in [−1, 1] and its label."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

NO_LABEL = -1
DEFAULT_LEVELS = 256


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Map-style dataset of ``(image, label)``.

    ``image`` is float32 (C, H, W) in [−1, 1]. ``label`` is an int in [0, num_classes); in a
    dataset without labels ``num_classes`` is None and every label is ``NO_LABEL`` (−1), so that
    the default collate function works either way.

    Attributes:
        shape: (C, H, W) of every image.
        num_classes: number of labels, or None.
        levels: how many grey levels a pixel has, evenly spaced from −1 to 1: 256 unless the dataset knows better.
    """

    shape: tuple[int, int, int]
    num_classes: int | None
    levels: int = DEFAULT_LEVELS

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError


class ArrayImages(ImageDataset):
    """Images held in memory: uint8 (N, C, H, W), 0..255, or float32 (N, C, H, W) in [−1, 1].

    ``labels`` is an integer array (N,) or None; there are max + 1 classes unless ``num_classes``
    says otherwise. The callers have checked both: no error is raised here.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, num_classes: int | None = None) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = None if labels is None else labels.astype(np.int64)
        _, channels, height, width = images.shape
        self.shape = (channels, height, width)
        if num_classes is None and labels is not None:
            num_classes = int(labels.max()) + 1
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if image.dtype == torch.uint8:
            image = from_uint8(image)
        return image, NO_LABEL if self.labels is None else int(self.labels[index])


def from_uint8(image: Tensor) -> Tensor:
    """0..255 to float32 [−1, 1]: x / 127.5 − 1, so that 0 and 255 land on the ends exactly."""
    return image.to(torch.float32) / 127.5 - 1.0
