"""``diffkern sample``: images from a checkpoint, as a picture and as an ``.npz`` file."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from diffkern.cli.images import save_grid, to_uint8
from diffkern.models import UNet, atomic_write, load_model
from diffkern.sampling import Sampler
from diffkern.solvers import SOLVERS
from diffkern.training import find_checkpoint
from diffkern.training.checkpoint import EMA, MODEL, read_process

_MOST_COLUMNS = 20
# What solvers take besides eta, each a flag.
SOLVER_OPTIONS = ("order", "variant", "solver_type", "s_churn", "s_min", "s_max", "s_noise")


@dataclass(frozen=True)
class SampleCommand:
    """Draw images from a checkpoint: OUTPUT.png is a grid of them, OUTPUT.npz holds them as uint8 (N, H, W, C)
    in arr_0 and their labels in arr_1."""

    checkpoint: tyro.conf.Positional[Path]
    """The output folder of a training run (its newest checkpoint is taken), or one checkpoint."""
    output: Path = Path("out/samples")
    """The two files' path, without a suffix."""
    n: int = 16
    """How many images."""
    labels: tuple[int, ...] = ()
    """Classes, taken in turn; by default all of them."""
    solver: Annotated[str, tyro.conf.arg(metavar="|".join(SOLVERS))] = "ddim"
    """ddpm is the full ancestral sampler if --steps is the process's own number; dpmpp_2m, DPM-Solver++(2M), is of
    second order and made for few steps. docs/solvers.md has them all."""
    steps: int = 50
    """Steps of the process; most solvers evaluate the network once in each."""
    spacing: Literal["respaced", "leading", "trailing", "linspace"] = "respaced"
    """Which of the process's timesteps they are."""
    steps_offset: int = 0
    """Added to every timestep of --spacing leading."""
    sigmas: Literal["linear", "karras", "exponential", "polyexponential", "beta", "lu"] | None = None
    """Space the levels of noise by this formula instead, between timesteps too."""
    guidance: float | None = None
    """Weight of classifier-free guidance; 1 is the plain conditional network."""
    guidance_rescale: float | None = None
    """From 0 to 1, how far guidance keeps the standard deviation of the conditional network's output."""
    threshold: tuple[float, float] | None = None
    """Dynamic thresholding instead of clipping: the quantile of |x0|, such as 0.995, and its upper bound."""
    eta: float | None = None
    """Noise of ddim and euler_ancestral, from 0 to 1."""
    order: int | None = None
    """Of lms, deis and unipc."""
    variant: Literal["bh1", "bh2"] | None = None
    """Of unipc."""
    solver_type: Literal["midpoint", "heun"] | None = None
    """Of dpmpp_2m_sde."""
    s_churn: float | None = None
    """Noise that euler and heun add before their steps."""
    s_min: float | None = None
    """The least level of noise, sigma/alpha, at which --s-churn adds any."""
    s_max: float | None = None
    """The largest such level."""
    s_noise: float | None = None
    """What the noise of --s-churn and of euler_ancestral is multiplied with."""
    seed: int = 0
    """Image i of a seed is the same in every batch."""
    batch_size: int | None = None
    """Images made at once; by default all."""
    weights: Annotated[Literal["ema", "model"], tyro.conf.arg(metavar="ema|model")] = "ema"
    """The running average, or the weights of the last step."""


def run(arguments: list[str]) -> None:
    command = tyro.cli(SampleCommand, prog="diffkern sample", args=arguments)
    if command.n < 1:
        raise ValueError(f"--n {command.n}: it must be 1 or more")
    checkpoint = find_checkpoint(command.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(checkpoint / (EMA if command.weights == "ema" else MODEL), device=device)
    process, shape = read_process(checkpoint)
    if command.guidance not in (None, 1) and not model.config.null_label:
        raise ValueError(f"--guidance {command.guidance}: this network was trained without label dropout")
    labels = _labels(command, model)
    options = {name: getattr(command, name) for name in SOLVER_OPTIONS}
    sampler = Sampler(
        model,
        process,
        shape,
        solver=command.solver,
        steps=command.steps,
        spacing=command.spacing,
        steps_offset=command.steps_offset,
        sigmas=command.sigmas,
        guidance_scale=command.guidance,
        guidance_rescale=command.guidance_rescale,
        threshold=command.threshold,
        eta=command.eta,
        **{name: value for name, value in options.items() if value is not None},
    )
    images = sampler.sample(command.n, seed=command.seed, labels=labels, batch_size=command.batch_size, progress=True)
    _write(command, to_uint8(images), labels)


def _labels(command: SampleCommand, model: UNet) -> list[int] | None:
    """One label per image; None for a network without classes."""
    if model.num_classes is None:
        if command.labels:
            raise ValueError("--labels: this network has no classes")
        return None
    turn = command.labels or range(model.num_classes)
    return [turn[index % len(turn)] for index in range(command.n)]


def _write(command: SampleCommand, pixels: np.ndarray, labels: list[int] | None) -> None:
    arrays = [pixels] if labels is None else [pixels, np.array(labels)]
    classes = len(set(labels or ()))
    columns = classes if 1 < classes <= _MOST_COLUMNS else math.ceil(math.sqrt(command.n))
    command.output.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix: "run.2" is a name of its own.
    picture, archive = (command.output.with_name(command.output.name + suffix) for suffix in (".png", ".npz"))
    atomic_write(picture, lambda path: save_grid(pixels, path, columns))
    atomic_write(archive, lambda path: _savez(path, arrays))
    print(f"{command.n} images in {picture} and {archive}")


def _savez(path: Path, arrays: list[np.ndarray]) -> None:
    with open(path, "wb") as file:  # given a name, numpy appends a suffix to it
        np.savez_compressed(file, *arrays)
