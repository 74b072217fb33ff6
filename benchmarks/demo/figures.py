"""The demo's two pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_samples(path: Path, panels: dict[str, np.ndarray], per_class: int) -> None:
    """One panel a solver: ten rows, one a class, of `per_class` images (8, 8) in [−1, 1]."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 6.6), layout="constrained")
    gap = 2
    for axis, (title, images) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        size = images.shape[-1] + gap
        sheet = np.full((10 * size - gap, per_class * size - gap), -1.0)
        for index, image in enumerate(images):
            row, column = divmod(index, per_class)
            sheet[row * size : row * size + size - gap, column * size : column * size + size - gap] = image
        axis.imshow(sheet, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=13, pad=8)
        axis.set_yticks(
            [row * size + size / 2 - 1.5 for row in range(10)], [str(digit) for digit in range(10)], fontsize=12
        )
        axis.set_xticks([])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle("Digits drawn by diffkern; the label asked for stands at the left", fontsize=14)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_losses(path: Path, losses: list[float], window: int = 50) -> None:
    """The loss of every step, and its running mean."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(np.arange(1, len(losses) + 1), losses, color="0.8", linewidth=0.6, label="each step")
    if len(losses) >= window:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axis.plot(np.arange(window, len(losses) + 1), mean, color="C0", label=f"mean of {window} steps")
    axis.set(xlabel="training step", ylabel="mean squared error of ε", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
