"""The variational bound of a data set in bits/dim, term by term."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from diffkern.evaluation.images import EvaluationImages
from diffkern.evaluation.pairs import PairLoop, describe_evaluation
from diffkern.evaluation.result import NllResult
from diffkern.evaluation.store import Store
from diffkern.models.atomic import atomic_write
from diffkern.ops import vb_terms
from diffkern.process import GaussianProcess
from diffkern.process.likelihood import prior_bits_per_dim
from diffkern.sampling.network import Model

NLL_STREAM = 8  # of the noise layout
TERMS = "nll.npz"
RESULT = "nll.json"
_NAMES = ("vb", "mse", "x0_mse")


def evaluate_nll(
    model: Model,
    process: GaussianProcess,
    data: Dataset | Tensor,
    *,
    levels: int = 256,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    output: Path | None = None,
    resume: bool = False,
    save_every: float = 10.0,
    progress: bool = False,
) -> NllResult:
    """An upper bound of −log₂ p(image)/d, averaged over `data`: L_T + Σ_t L_t + L_0 (Ho et al. 2020, arXiv 2006.11239,
    eq. 5).

    L_T and the KL terms L_t are in closed form but for the noise of x_t, of which each has `draws`; L_0 is minus the
    logarithm of the exact mass of the pixel's bin under the last step's Gaussian (`vb_terms`, decoder "exact").

    Args:
        model: ``model(x_t, t)``, or ``model(x_t, t, labels)`` if its attribute ``num_classes`` is a number. Called in
            eval mode without gradients on x_t (n, C, H, W) in its weights' dtype and t int64 (n,), float32 where the
            process's ``timestep_map`` is fractional; n up to `batch_size`, of any mixture of images and timesteps.
        process: all its timesteps are evaluated; respace it for the bound of the shorter process.
        data: images (C, H, W) in [−1, 1], or (image, label): a map-style data set, or a tensor (N, C, H, W).
        levels: grey levels of the data between −1 and 1.
        clip: what x̂0 is clipped to before the mean is made from it, None for nothing; without effect where the
            network predicts x_prev. Either way it is a bound, of the model that samples so; the default is that of
            `Sampler`. For data in the interval it lowers every KL term, x̂0 being nearer to x0.
        draws: noises per image and timestep.
        seed: of the noise, in [0, 2⁶⁴). Pair (image n, t) has the same noise in any batch and beside any other images.
        batch_size: pairs that the network is called on at once.
        output: folder for nll.npz, the terms, written as they become known, and nll.json, the result.
        resume: go on from the terms in `output`, if there are any: the result is that of one run, bit for bit.
        save_every: seconds between two writings of nll.npz, more where writing takes long.
        progress: show a bar (tqdm).

    Raises:
        ValueError: an argument out of its range; data or model that do not fit; `output` belongs to other settings.
        TypeError: another process than a GaussianProcess; a model that returns no tensor.
        FileExistsError: `output` holds an evaluation and `resume` is False.
        FloatingPointError: the network gave NaN or Inf; says where.
        KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}; it must be at least 2")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip is {clip}; it must be (lo, hi) with lo < hi, or None")
    images = EvaluationImages(data, getattr(model, "num_classes", None), levels)
    loop = PairLoop(model, process, images, seed=seed, stream=NLL_STREAM, draws=draws, batch_size=batch_size)
    settings = describe_evaluation(
        model, process, images, levels=levels, clip=clip and list(clip), draws=draws, seed=seed, batch_size=batch_size
    )
    store = None if output is None else Store(output / TERMS, settings, resume)

    def terms(x0: Tensor, t: Tensor, x_t: Tensor, out: Tensor, noise: Mapping[str, Any]) -> tuple[Tensor, ...]:
        found = vb_terms(
            out, x0, t, loop.tables, levels=levels, decoder="exact", clip=clip, target=process.prediction, **noise
        )
        return found.vb, found.mse, found.x0_mse

    arrays = loop.run(terms, _NAMES, store, save_every, progress)
    prior = prior_bits_per_dim(images.mean_squares, float(process.alphas_cumprod[-1]))
    result = NllResult(**arrays, prior=prior, timesteps=np.array(process.timestep_map), settings=settings)
    if output is not None:
        text = json.dumps(result.to_json(), indent=1, allow_nan=False)
        atomic_write(output / RESULT, lambda path: path.write_text(text))
    return result
