"""A U-Net evaluation, a sampling step and a training step on CIFAR-10's shape, against the same in torch alone.

Wall-clock time of whole steps: launches, the host's work and, in training, the data loader count on both sides.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch.utils.data import Dataset

from benchmarks import eager
from benchmarks.baselines import Unavailable, first_line
from diffkern.models import UNet, UNetConfig
from diffkern.ops import solver_step
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import build
from diffkern.training import TrainConfig
from diffkern.training.data.loader import CheckedImages
from diffkern.training.objective import make_objective
from diffkern.training.run import TrainingRun

# Ho et al.'s CIFAR-10 network has 128 channels; a CPU takes seconds for what a GPU needs to be busy.
CHANNELS = {"cpu": 64, "cuda": 128}
BATCH = {"cpu": 2, "cuda": 64}
ROUNDS = {"cpu": 5, "cuda": 25}
STEP = {"within": "group_norm", "wall_clock": True}


class Noise(Dataset):
    """Images of CIFAR-10's shape that are none: time does not depend on what a pixel shows."""

    def __init__(self, count):
        self.images = torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def network(device):
    """Channels last, without the zeros that some weights begin with."""
    torch.manual_seed(0)
    model = UNet(dataclasses.replace(UNetConfig.ddpm_cifar10(), channels=CHANNELS[device]))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device, memory_format=torch.channels_last)


@pytest.fixture
def batch(device):
    """A state and the time that the network is given with it."""
    x = torch.randn(BATCH[device], 3, 32, 32).to(device, memory_format=torch.channels_last)
    return x, torch.full((len(x),), 500, device=device)


def case_name(device):
    return f"{BATCH[device]}×3×32×32, channels_last, {CHANNELS[device]} channels"


def close_to(expected):
    """Two networks in float32, whose convolutions add up in other orders, agree to some 1e-5; TF32 to 1e-3."""
    tolerance = 1e-4 if expected.device.type == "cpu" else 5e-3
    largest = float(expected.abs().max())
    return lambda result: torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * largest)


@torch.no_grad()
def test_network(compare, device, network, batch):
    network, twin = network.eval(), eager.network(network).eval()
    compare(
        "U-Net evaluation",
        case_name(device),
        "eager",
        lambda: network(*batch),
        lambda: twin(*batch),
        check=close_to(twin(*batch)),
        rounds=ROUNDS[device],
        **STEP,
    )


@torch.no_grad()
def test_sampling_step(compare, device, network, batch):
    network, twin = network.eval(), eager.network(network).eval()
    process = GaussianProcess(linear_betas(1000))
    program, step = build("ddim", process.respace(50), clip=(-1.0, 1.0)), eager.DDIMStep(process, 50)
    row, (x, t) = program.num_rows // 2, batch
    compare(
        "sampling step",
        f"DDIM, {case_name(device)}",
        "eager",
        lambda: solver_step(x, network(x, t), program, row, seed=0),
        lambda: step(x, twin(x, t), row),
        check=close_to(step(x, twin(x, t), row)),
        rounds=ROUNDS[device],
        **STEP,
    )


def test_training_step(compare, device, network):
    """Both sides change a copy of the network of their own and draw noise of their own; the losses are finite."""
    process = GaussianProcess(linear_betas(1000))
    config = TrainConfig(batch_size=BATCH[device], label_dropout=0.0, progress=False)
    with contextlib.ExitStack() as stack:
        ours, plain = training_steps(stack, network, process, config)
        compare(
            "training step",
            case_name(device),
            "eager",
            ours,
            plain,
            check=all_finite,
            check_baseline=all_finite,
            rounds=ROUNDS[device],
            **STEP,
        )


def training_steps(stack, network, process, config):
    """diffkern's and eager's step, each on a copy of the network and a data loader of its own."""
    images = CheckedImages(Noise(8 * config.batch_size), None)
    objective = make_objective(config, process, levels=256, takes_self_cond=False)
    try:
        runs = [TrainingRun(copy.deepcopy(network), process, objective, images, config, null=None) for _ in range(2)]
    except ImportError as error:
        return 2 * [unavailable(f"accelerate does not import: {first_line(error)}")]
    batches, plain_batches = [stack.enter_context(run.prepared()) for run in runs]
    plain = eager.TrainingStep(
        eager.network(network).train(),
        process,
        plain_batches,
        lr=config.lr,
        grad_clip=config.grad_clip,
        ema_decay=config.ema_decay,
        label_dropout=config.label_dropout,
        null_label=None,
    )
    return lambda: runs[0].train_step(batches), plain


def unavailable(reason):
    def call():
        raise Unavailable(reason)

    return call


def all_finite(result):
    assert bool(result.isfinite().all())
