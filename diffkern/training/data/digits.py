"""The 1,797 handwritten digits that scikit-learn ships."""

from typing import Literal

import numpy as np

from diffkern.training.data.base import ArrayImages

# Every seventh image is held out. Seven is coprime to ten: the first digits of the set run
# 0, 1, … 9, 0, 1, …, and a stride of ten would hold out a single class of them.
_STRIDE = 7


class Digits(ArrayImages):
    """8×8 grey images (1, 8, 8) of 17 levels, 0..16 mapped to [−1, 1], with labels 0..9.

    ``split``: "all" (1,797), "train" (1,541) or "heldout" (256); always the same images in the
    same order. Needs scikit-learn. Source: UCI, Optical Recognition of Handwritten Digits
    (Alpaydin and Kaynak, 1998), as in ``sklearn.datasets.load_digits``.

    Raises:
        ValueError: an unknown split.
    """

    levels = 17

    def __init__(self, split: Literal["all", "train", "heldout"] = "all") -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        heldout = np.arange(len(digits.images)) % _STRIDE == _STRIDE - 1
        chosen = {"all": np.ones_like(heldout), "train": ~heldout, "heldout": heldout}
        if split not in chosen:
            raise ValueError(f"split={split!r}: it may be 'all', 'train' or 'heldout'")
        images = (digits.images[chosen[split]] / 8.0 - 1.0).astype(np.float32)
        super().__init__(images[:, None], digits.target[chosen[split]], num_classes=10)
