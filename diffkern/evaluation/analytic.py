"""What the analytic reverse variance needs to know of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffkern.evaluation.images import EvaluationImages
from diffkern.evaluation.pairs import PairLoop, describe_evaluation
from diffkern.evaluation.store import Store
from diffkern.process import GaussianProcess
from diffkern.sampling.network import Model

ANALYTIC_STREAM = 9  # of the noise layout
ESTIMATE = "eps_mean_square.npz"


def estimate_eps_mean_square(
    model: Model,
    process: GaussianProcess,
    data: Dataset | Tensor,
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    output: Path | None = None,
    resume: bool = False,
    save_every: float = 10.0,
    progress: bool = False,
) -> np.ndarray:
    """E‖ε̂(x_t, t)‖²/d at each timestep over `data` and the noise, float64 (T,): `GaussianProcess`'s `eps_mean_square`.

    ε̂ is the network's prediction, whatever it predicts, as noise (Bao et al. 2022, arXiv 2201.06503, section 3.1). An
    estimate from few images scatters by about √(2/(n·d)), which 1/ᾱ_t − 1 makes much of where x_t is nearly noise; so
    it is held to what images in [−1, 1] allow, Var(x0 | x_t) ≤ 1 (their theorem 2): at least 1 − ᾱ_t/(1 − ᾱ_t).

    Give it images that the network was trained on rather than those to be evaluated: the variance is then part of the
    model. The arguments are those of :func:`diffkern.evaluation.evaluate_nll`; what is known so far stands in
    `output`/eps_mean_square.npz.

    Raises:
        ValueError: an argument out of its range; a process that learns its variance, or whose prediction does not say
            what eps is; data or model that do not fit; `output` belongs to other settings.
        FileExistsError, FloatingPointError, KeyboardInterrupt: as for `evaluate_nll`.
    """
    images = EvaluationImages(data, getattr(model, "num_classes", None))
    loop = PairLoop(model, process, images, seed=seed, stream=ANALYTIC_STREAM, draws=draws, batch_size=batch_size)
    if process.model_log_variance is None:
        raise ValueError(f"process.variance is {process.variance!r}: a learned variance is not estimated")
    of_x, of_output = process.conversion(process.prediction, "eps")
    if not (np.isfinite(of_x) & np.isfinite(of_output)).all():
        raise ValueError(
            f"process.prediction is {process.prediction!r}, from which eps cannot be had at every timestep"
        )
    settings = describe_evaluation(model, process, images, draws=draws, seed=seed, batch_size=batch_size)
    store = None if output is None else Store(output / ESTIMATE, settings, resume)
    p, q = (torch.tensor(table, device=loop.place.device) for table in (of_x, of_output))

    def terms(x0: Tensor, t: Tensor, x_t: Tensor, out: Tensor, noise: Mapping[str, Any]) -> tuple[Tensor]:
        if out.shape != x0.shape:
            raise ValueError(f"the model's output is {tuple(out.shape)}, the images are {tuple(x0.shape)}")
        eps = p[t].view(-1, 1, 1, 1) * x_t + q[t].view(-1, 1, 1, 1) * out
        return (eps.square().mean(dim=(1, 2, 3)),)

    mean_squares = loop.run(terms, ("eps_mean_square",), store, save_every, progress)["eps_mean_square"]
    least = 1.0 - process.alphas_cumprod / (1.0 - process.alphas_cumprod)
    return np.maximum(mean_squares.mean(axis=0, dtype=np.float64), least)
