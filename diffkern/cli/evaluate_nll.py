"""``diffkern evaluate nll``: the likelihood bound of a data set under a checkpoint, as JSON, arrays and a picture."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch.utils.data import Subset

from diffkern.evaluation import NllResult, estimate_eps_mean_square, evaluate_nll, plot_terms
from diffkern.evaluation.analytic import ESTIMATE
from diffkern.evaluation.nll import RESULT, TERMS
from diffkern.models import UNet, atomic_write, load_model
from diffkern.process import GaussianProcess
from diffkern.training import ImageDataset, Split, find_checkpoint, open_data
from diffkern.training.checkpoint import EMA, MODEL, read_process

_PICTURE = "nll.png"
_FLAGS = "config.json"


@dataclass(frozen=True)
class NllCommand:
    """The variational bound of -log2 p(image) in bits/dim. OUTPUT/nll.json holds the result, nll.npz every term,
    nll.png the terms' means over the timesteps."""

    checkpoint: tyro.conf.Positional[Path]
    """The output folder of a training run (its newest checkpoint is taken), or one checkpoint."""
    data: Annotated[str, tyro.conf.arg(metavar="digits|FOLDER|FILE.npz")] = "digits"
    """What to evaluate on. The images of a folder are cropped and resized to those of the checkpoint."""
    split: Split | None = None
    """Of the digits: the 256 images that training leaves out by default (heldout, the default here), the other 1,541
    (train), or all."""
    images: int | None = None
    """How many, spread evenly over the data; by default all."""
    batch_size: int = 256
    """Pairs of an image and a timestep that the network is called on at once."""
    steps: int | None = None
    """Evaluate the process of so many steps; by default of all."""
    variance: Literal["fixed_small", "fixed_large", "analytic"] | None = None
    """Another variance of the reverse process than the checkpoint's, where that is not learned. analytic first
    estimates the best one for this network."""
    analytic_data: Annotated[str | None, tyro.conf.arg(metavar="digits|FOLDER|FILE.npz")] = None
    """What it is estimated on, best the training images; by default --data, of the digits their split "train"."""
    analytic_images: int = 256
    """How many of them, spread evenly."""
    weights: Annotated[Literal["ema", "model"], tyro.conf.arg(metavar="ema|model")] = "ema"
    """The running average, or the weights of the last step."""
    levels: int | None = None
    """Grey levels of the data between -1 and 1; by default what the data know of themselves, else 256."""
    clip: bool = True
    """Clip the predicted image to [-1, 1] before the mean is made from it, as sampling does."""
    draws: int = 1
    """Noises per image and timestep."""
    seed: int = 0
    """Of the noise."""
    output: Path = Path("out/nll")
    """Folder of the results."""
    resume: bool = False
    """Go on with what a killed evaluation of the same settings left in OUTPUT."""
    progress: bool = True
    """Show a bar."""


def run(arguments: list[str]) -> None:
    command = tyro.cli(NllCommand, prog="diffkern evaluate nll", args=arguments)
    for name in (TERMS, ESTIMATE):
        if not command.resume and (command.output / name).exists():
            raise FileExistsError(
                f"{command.output / name}: holds an earlier evaluation: --resume, or another --output"
            )
    if command.analytic_data is not None and command.variance != "analytic":
        raise ValueError(f"--analytic-data {command.analytic_data}: it needs --variance analytic")
    checkpoint = find_checkpoint(command.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(checkpoint / (EMA if command.weights == "ema" else MODEL), device=device)
    process, shape = read_process(checkpoint)
    data, described = _open(command.data, command.split, shape, "--data")
    levels = data.levels if command.levels is None else command.levels
    chosen = _spread(data, command.images, "--images")
    print(f"{len(chosen):,} images of {described} at {levels} grey levels; {checkpoint}, weights {command.weights}")
    process = _process(command, process, model, shape)
    result = evaluate_nll(
        model,
        process,
        chosen,
        levels=levels,
        clip=(-1.0, 1.0) if command.clip else None,
        draws=command.draws,
        seed=command.seed,
        batch_size=command.batch_size,
        output=command.output,
        resume=command.resume,
        progress=command.progress,
    )
    flags = asdict(command) | {"checkpoint": str(checkpoint), "output": str(command.output), "levels": levels}
    atomic_write(command.output / _FLAGS, lambda path: path.write_text(json.dumps(flags, indent=2)))
    print(_summary(result))
    written = [RESULT, TERMS]
    if _draw(result, command.output / _PICTURE):
        written.append(_PICTURE)
    print(f"{command.output}: {', '.join(written)}")


def _open(source: str, split: Split | None, shape: tuple[int, ...], flag: str) -> tuple[ImageDataset, str]:
    """The data set and what to call it."""
    if source == "digits":
        split = split or "heldout"
    data = open_data(source, size=shape[1], channels=shape[0], split=split)
    described = source if split is None else f"{source}, split {split}"
    if tuple(data.shape) != tuple(shape):
        raise ValueError(f"{flag} {source}: its images are {tuple(data.shape)}, those of the checkpoint {tuple(shape)}")
    return data, described


def _spread(data: ImageDataset, count: int | None, flag: str) -> Subset[Any]:
    """`count` of the images, evenly: the first ones of a folder would be of one class."""
    total = len(data)
    if count is None:
        count = total
    if not 1 <= count <= total:
        raise ValueError(f"{flag} {count}: it must be from 1 to {total}, the images that there are")
    return Subset(data, [index * total // count for index in range(count)])


def _process(
    command: NllCommand, process: GaussianProcess, model: UNet, shape: tuple[int, int, int]
) -> GaussianProcess:
    """The checkpoint's process with the steps and the variance of the flags."""
    if command.steps is not None:
        process = process.respace(command.steps)
    if command.variance is None:
        return process
    if process.model_log_variance is None:
        raise ValueError(f"--variance {command.variance}: this network has learned its variance")
    if command.variance != "analytic":
        return GaussianProcess(process.betas, process.prediction, command.variance, process.timestep_map)
    source = command.analytic_data or command.data
    data, described = _open(source, "train" if source == "digits" else None, shape, "--analytic-data")
    chosen = _spread(data, min(command.analytic_images, len(data)), "--analytic-images")
    print(f"the analytic variance is estimated on {len(chosen):,} images of {described}")
    mean_squares = estimate_eps_mean_square(
        model,
        process,
        chosen,
        seed=command.seed,
        batch_size=command.batch_size,
        output=command.output,
        resume=command.resume,
        progress=command.progress,
    )
    return GaussianProcess(process.betas, process.prediction, "analytic", process.timestep_map, mean_squares)


def _summary(result: NllResult) -> str:
    found = result.to_json()
    low, high = result.confidence
    parts = f"decoder {found['decoder']:.4f} + KL {found['kl']:.4f} + L_T {found['prior']:.2e}"
    if len(result.prior) == 1:
        return f"{result.bits_per_dim:.4f} bits/dim for one image: {parts}"
    return f"{result.bits_per_dim:.4f} bits/dim, 95 % confidence {low:.4f} to {high:.4f}: {parts}"


def _draw(result: NllResult, path: Path) -> bool:
    """Whether there is a picture: matplotlib comes with the extra "demo" alone."""
    try:
        atomic_write(path, lambda temporary: plot_terms(result, temporary))
    except ModuleNotFoundError as error:
        print(f'no {_PICTURE}: {error}; pip install "diffkern[demo]"')
        return False
    return True
