"""From a dataset to the micro-batches of a training run."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffkern.training.data.base import NO_LABEL
from diffkern.training.data.order import StreamBatches


class CheckedImages(Dataset[tuple[Tensor, int]]):
    """Any map-style dataset of images or ``(image, label)`` pairs, each item checked when it is read.

    Raises:
        ValueError: an image that is not a floating tensor (C, H, W), that has another shape than the first one,
            or that holds NaN or Inf; an item without a label where ``num_classes`` asks for one, or a label outside
            [0, num_classes). The message gives the index.
    """

    def __init__(self, data: Dataset[Any], num_classes: int | None) -> None:
        self.data, self.num_classes = data, num_classes
        self.shape: tuple[int, ...] = ()
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # Dataset does not declare it; map-style ones have it

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.data[index]
        image, label = item if isinstance(item, (tuple, list)) else (item, NO_LABEL)
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {index} of the data is {found}; it must be a floating tensor (C, H, W)")
        if self.shape and tuple(image.shape) != self.shape:
            raise ValueError(f"image {index} of the data is {tuple(image.shape)}; the first one is {self.shape}")
        if not torch.isfinite(image).all():
            raise ValueError(f"image {index} of the data holds NaN or Inf")
        if self.num_classes is not None and not 0 <= int(label) < self.num_classes:
            given = "no label" if label == NO_LABEL else f"label {int(label)}"
            raise ValueError(f"image {index} of the data has {given}; the model takes 0 to {self.num_classes - 1}")
        return image.float(), int(label)


def micro_batches(
    images: CheckedImages, order: StreamBatches, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (float32 (n, C, H, W), int64 (n,)) on ``device``, in the order of ``order``."""
    loader = DataLoader(
        images,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # Left out, the loader draws from torch's own generator, and a resumed run would differ from the first one.
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupt,
    )
    for x0, labels in loader:
        yield x0.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process still needs images for the step in hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
