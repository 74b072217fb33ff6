"""How good the drawn digits are, judged by real ones."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from diffkern.training import Digits


def pixels(digits: Digits) -> tuple[np.ndarray, np.ndarray]:
    """Images as float64 (n, 64) in [−1, 1], labels (n,)."""
    images, labels = zip(*(digits[i] for i in range(len(digits))), strict=True)
    return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in images]), np.asarray(labels)


def class_agreement(samples: np.ndarray, labels: Tensor, train: Digits) -> float:
    """The share of samples (n, 8, 8) that a logistic regression fitted on the real digits takes for their label."""
    from sklearn.linear_model import LogisticRegression

    images, classes = pixels(train)
    classifier = LogisticRegression(max_iter=2000, C=0.1).fit(images, classes)
    return float((classifier.predict(samples.reshape(len(samples), -1)) == labels.numpy()).mean())


def nearest_neighbour_ratio(samples: np.ndarray, train: Digits, heldout: Digits) -> float:
    """Mean distance of samples to the nearest training digit over that of held-out digits.

    Near 1 the samples are as far from the training set as real digits it does not hold; near 0 they are copies of it.
    """
    known, _ = pixels(train)
    unseen, _ = pixels(heldout)
    return float(_nearest(samples.reshape(len(samples), -1), known).mean() / _nearest(unseen, known).mean())


def _nearest(points: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - known[None], axis=-1).min(axis=1)
