"""``diffkern train``: data, network, process and training settings, all flags of their own dataclasses."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from diffkern.models import CheckpointError, UNet, UNetConfig, atomic_write
from diffkern.process import GaussianProcess, make_betas
from diffkern.training import LearnedSchedule, Split, TrainConfig, Trainer, open_data
from diffkern.training.checkpoint import require_fresh

_CONFIG = "config.json"
# Fields of the network that follow other flags, and which.
_FOLLOWS = {
    "in_channels": "the data",
    "num_classes": "the data",
    "null_label": "the data and --label-dropout",
    "learn_sigma": "--process.variance",
    "self_condition": "--self-conditioning",
}


@dataclass(frozen=True)
class ProcessConfig:
    """The diffusion process."""

    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_beta", "laplace", "exp", "learned"] = (
        "linear"
    )
    """Of the betas; learned: trained with the network, on the bound in continuous time."""
    num_timesteps: int = 1000
    """How many steps of noise."""
    prediction: Literal["eps", "x0", "v", "x_prev", "flow"] = "eps"
    """What the network learns to give: the noise, the image, v, the mean of the step before, or noise less image. A
    learned schedule takes all but x_prev."""
    variance: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_small"
    """Of a sampling step of the full process: the posterior's, or beta; or learned, freely or between the two. A
    learned schedule takes one of the fixed ones."""

    def build(self) -> GaussianProcess | LearnedSchedule:
        if self.schedule == "learned":
            return LearnedSchedule(self.num_timesteps, self.prediction, self.variance)
        return GaussianProcess(make_betas(self.schedule, self.num_timesteps), self.prediction, self.variance)


@dataclass(frozen=True)
class TrainCommand:
    """Train a U-Net. The flags are kept in OUTPUT/config.json, from which --resume takes those that are not given."""

    data: Annotated[str, tyro.conf.arg(metavar="digits|FOLDER|FILE.npz")] = "digits"
    """The 1,797 digits of scikit-learn; a folder of images, its subfolders being the classes; or an .npz file."""
    split: Split | None = None
    """Of the digits: all but the 256 that evaluate nll takes (train, the default), these alone (heldout), or all."""
    image_size: int = 32
    """Side to which the images of a folder are cropped and resized."""
    image_channels: Literal[1, 3] = 3
    """Of the images of a folder: 1 for grey, 3 for RGB."""
    preset: Literal["digits", "ddpm_cifar10"] = "digits"
    """The network that the flags --model.* start from."""
    model: UNetConfig = field(default_factory=UNetConfig.digits)
    """The network. in_channels, num_classes, null_label, learn_sigma and self_condition follow from the rest."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(output=Path("out/train"))
    )
    resume: bool = False
    """Go on from the newest checkpoint of --output."""


def run(arguments: list[str]) -> None:
    command = _parse(arguments)
    config, output = command.train, command.train.output
    if output is None:
        raise ValueError("--output: a folder is needed")
    if not command.resume:
        require_fresh(output)
    split: Split | None = command.split or ("train" if command.data == "digits" else None)
    data = open_data(command.data, size=command.image_size, channels=command.image_channels, split=split)
    model_config = replace(
        command.model,
        in_channels=data.shape[0],
        num_classes=data.num_classes,
        null_label=data.num_classes is not None and config.label_dropout > 0,
        learn_sigma=command.process.variance.startswith("learned"),
        self_condition=config.self_conditioning > 0,
    )
    torch.manual_seed(config.seed)
    model = UNet(model_config)
    trainer = Trainer(model, command.process.build(), data, config)
    output.mkdir(parents=True, exist_ok=True)
    configuration = output / _CONFIG
    before = configuration.read_text() if configuration.exists() else None
    atomic_write(configuration, lambda path: path.write_text(json.dumps(_to_json(command), indent=2)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    classes = f"{data.num_classes} classes" if data.num_classes else "no labels"
    _say(f"{len(data):,} images {tuple(data.shape)}, {classes}; a U-Net of {parameters:,} parameters")
    try:
        result = trainer.fit(resume=command.resume)
    except CheckpointError:
        if before is not None:  # what cannot go on with the checkpoint is not to be the run's configuration
            atomic_write(configuration, lambda path: path.write_text(before))
        raise
    _say(f"{result.images_per_second:.0f} images/s; the last checkpoint is {result.checkpoint}")


def _parse(arguments: list[str]) -> TrainCommand:
    """The first pass only finds out what the defaults are: those of a preset, or of the run to resume."""
    for argument in arguments:
        name = argument.partition("=")[0].replace("-", "_").replace("no_", "")
        field_name = name.removeprefix("__model.")
        if field_name in _FOLLOWS:
            raise ValueError(f"{argument}: it follows {_FOLLOWS[field_name]}, and cannot be given")
    first = tyro.cli(TrainCommand, prog="diffkern train", args=arguments)
    stored = first.train.output / _CONFIG if first.train.output else None
    if first.resume and stored and stored.exists():
        default = _from_json(stored)
    else:
        default = TrainCommand(model=getattr(UNetConfig, first.preset)())
    return tyro.cli(TrainCommand, prog="diffkern train", args=arguments, default=default)


def _to_json(command: TrainCommand) -> dict[str, Any]:
    values = asdict(command) | {"model": command.model.to_dict()}
    values["train"]["output"] = str(command.train.output)
    del values["resume"]
    return values


def _from_json(path: Path) -> TrainCommand:
    try:
        values = json.loads(path.read_text())
        train = values.pop("train")
        if values["data"] == "digits":
            values.setdefault("split", "all")  # what runs took before they could choose
        return TrainCommand(
            model=UNetConfig.from_dict(values.pop("model")),
            process=ProcessConfig(**values.pop("process")),
            train=TrainConfig(**train | {"output": Path(train["output"])}),
            **values,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a training run: {error}") from error


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)
