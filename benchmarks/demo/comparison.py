"""One step of training and of sampling, diffkern against `benchmarks.eager`, interleaved in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import eager
from benchmarks.timing import interleave
from diffkern.models import UNet
from diffkern.ops import philox_normal, solver_step
from diffkern.process import GaussianProcess
from diffkern.solvers import StepProgram, build
from diffkern.training import Digits, TrainConfig
from diffkern.training.data.loader import CheckedImages
from diffkern.training.objective import make_objective
from diffkern.training.run import TrainingRun


@dataclass(frozen=True)
class Comparison:
    """Median seconds of one step."""

    what: str
    eager: float
    diffkern: float

    @property
    def ratio(self) -> float:
        """Eager's time over diffkern's."""
        return self.eager / self.diffkern


def compare_training(model: UNet, process: GaussianProcess, data: Digits, config: TrainConfig) -> Comparison:
    """A training step of copies of `model`; both read the same kind of batches and change their own weights."""
    config = replace(config, progress=False)
    objective = make_objective(config, process, levels=data.levels, takes_self_cond=False)
    run, plain_run = (
        TrainingRun(copy.deepcopy(model), process, objective, CheckedImages(data, 10), config, null=10)
        for _ in range(2)
    )
    with run.prepared() as batches, plain_run.prepared() as plain_batches:
        plain = eager.TrainingStep(
            eager.network(model).train(),
            process,
            plain_batches,
            lr=config.lr,
            grad_clip=config.grad_clip,
            ema_decay=config.ema_decay,
            label_dropout=config.label_dropout,
            null_label=10,
        )
        times = interleave({"eager": plain, "diffkern": lambda: run.train_step(batches)}, rounds=60, warmup=5)
    return Comparison(f"training, batch {config.batch_size}", times["eager"].p50, times["diffkern"].p50)


@torch.no_grad()
def compare_sampling(network: nn.Module, process: GaussianProcess, labels: Tensor) -> list[Comparison]:
    """A sampling step (network and solver) of DDIM-50 and of the ancestral DDPM."""
    network = network.eval()
    twin = eager.network(network).eval()
    x = philox_normal((len(labels), 1, 8, 8), seed=2, stream=1)
    comparisons = []
    for name, program, step in (
        ("DDIM", build("ddim", process.respace(50), clip=(-1.0, 1.0)), eager.DDIMStep(process, 50)),
        ("DDPM", build("ddpm", process, clip=(-1.0, 1.0)), eager.DDPMStep(process)),
    ):
        row = program.num_rows // 2
        time = torch.full((len(labels),), int(program.times[row]))
        _assert_equal(name, network, twin, program, step, x, time, labels)
        times = interleave(
            {
                "eager": lambda step=step, time=time, row=row: step(x, twin(x, time, labels), row),
                "diffkern": lambda program=program, time=time, row=row: solver_step(
                    x, network(x, time, labels), program, row, seed=0
                ),
            },
            rounds=60,
            warmup=5,
        )
        comparisons.append(
            Comparison(f"sampling ({name}), batch {len(labels)}", times["eager"].p50, times["diffkern"].p50)
        )
    return comparisons


def _assert_equal(
    name: str,
    network: nn.Module,
    twin: nn.Module,
    program: StepProgram,
    step: Callable[[Tensor, Tensor, int], Tensor],
    x: Tensor,
    time: Tensor,
    labels: Tensor,
) -> None:
    """Both sides compute the same before they are timed: the network everywhere, the step where it draws no noise."""
    output, expected = network(x, time, labels), twin(x, time, labels)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    row = program.num_rows // 2 if name == "DDIM" else program.num_rows - 1
    torch.testing.assert_close(solver_step(x, output, program, row, seed=0), step(x, output, row), rtol=1e-4, atol=1e-4)
