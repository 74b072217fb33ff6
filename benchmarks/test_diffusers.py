"""Whole steps of diffkern.integrations.diffusers against diffusers' own schedulers: tables, draws, Python and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import scheduler_pair
from benchmarks.compare import assert_close
from diffkern.backends import use_backend

SHAPES = [(256, 3, 32, 32), (1, 3, 32, 32)]  # of the second one the step is mostly the host's time
STEPS = 50
# A row's name, the class, the arguments of its step.
SCHEDULERS = {
    "DDIM, η = 0": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
}
NOISE = {"torch's draws": "torch", "own noise": "philox"}
CASES = [(name, noise) for name in SCHEDULERS for noise in ([None] if name != "DDPM" else NOISE)]


class Case:
    """A step in the middle of a run, made again and again, of both schedulers."""

    def __init__(self, name: str, noise: str | None, shape: tuple[int, ...], device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
        self.scheduler, self.kwargs = SCHEDULERS[name]
        self.noise, self.device = noise, device
        self.pair: tuple[Any, Any] | None = None
        # A generator each, so that neither side's draws depend on the other's.
        self.generators = [torch.Generator(device).manual_seed(3) for _ in range(2)]
        self.name = ", ".join(filter(None, [name, noise, "×".join(map(str, shape))]))

    def schedulers(self) -> tuple[Any, Any]:
        if self.pair is None:
            self.pair = scheduler_pair(self.scheduler, noise=NOISE[self.noise or "torch's draws"])
            for scheduler in self.pair:
                scheduler.set_timesteps(STEPS, device=self.device)
            for side, _ in [(side, k) for side in (0, 1) for k in range(3)]:
                # After three of them a multistep solver remembers nothing else.
                self.step(side, self.tensors, torch.Generator(self.device))
        return self.pair

    def step(self, side: int, tensors: list[Tensor], generator: torch.Generator) -> Tensor:
        scheduler = self.schedulers()[side]
        if hasattr(scheduler, "set_begin_index"):  # else it would go on to the next step
            scheduler._step_index = STEPS // 2
        source = {"generator": generator} if self.noise else {}
        x, output = tensors
        with torch.no_grad():
            return scheduler.step(output, scheduler.timesteps[STEPS // 2], x, **self.kwargs, **source)[0]

    def theirs(self) -> Tensor:
        return self.step(0, self.tensors, self.generators[0])

    def ours(self) -> Tensor:
        return self.step(1, self.tensors, self.generators[1])

    def check(self, result: Tensor) -> None:
        """Against diffusers from the same seed; with noise of our own against the reference in float64."""
        seeded = torch.Generator(self.device).manual_seed(3)
        if self.noise == "own noise":
            with use_backend("reference"):
                assert_close(self.step(1, [x.double() for x in self.tensors], seeded))(result)
        else:
            assert_close(self.step(0, self.tensors, seeded).double(), 1e-5)(result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "noise"), CASES)
def test_step(compare, device, name, noise, shape):
    case = Case(name, noise, shape, device)
    compare(
        "diffusers step",
        case.name,
        f"diffusers {case.scheduler}",
        case.ours,
        case.theirs,
        # x and the output in, x' and x0 out; a small step is no matter of bytes
        bytes_moved=4 * case.tensors[0].nbytes if shape == SHAPES[0] else None,
        check=case.check,
        within="solver_step",
        wall_clock=shape[0] == 1,
        headline=True,
    )
