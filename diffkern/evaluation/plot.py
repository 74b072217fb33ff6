"""The bound's terms over the timesteps as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffkern.evaluation.result import NllResult


def plot_terms(result: NllResult, path: Path) -> None:
    """Writes a PNG: each term's mean over the images with twice its standard error, both axes logarithmic.

    Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mean, error = result.curve
    error = np.nan_to_num(error)
    count = np.arange(1, len(mean) + 1)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (line,) = axes.plot(count, mean, linewidth=1.2, label="term of the bound")
    # A logarithmic axis has no place for a band that reaches zero.
    axes.fill_between(
        count, np.maximum(mean - 2 * error, mean / 10), mean + 2 * error, color=line.get_color(), alpha=0.25
    )
    axes.axhline(result.prior.mean(), color="0.5", linestyle="--", linewidth=1, label="L_T")
    axes.set(xscale="log", yscale="log", xlabel="t + 1 (the decoder's term is the first)", ylabel="bits/dim")
    low, high = result.confidence
    interval = "" if np.isnan(low) else f" [{low:.4f}, {high:.4f}]"
    axes.set_title(f"{result.bits_per_dim:.4f} bits/dim{interval}, {len(result.prior)} images", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
