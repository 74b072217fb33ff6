"""The cases of the table of GPU kernels: what is called on which tensors, and what share of a copy it is to reach.

A case makes a set of inputs, tensors by name, of which both sides are functions: `fused`, which is diffkern's op, and
`composition`, what a good user writes. `prepared` turns either into the call that is timed. `passes` is how often a
tensor of x's size is read or written at the least, which is all that is counted: an implementation that reads x twice
gets no credit for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import eager
from benchmarks.goals import Goal
from diffkern.backends import use_backend
from diffkern.ops import attention, diffusion_loss_and_grad, group_norm, q_sample, solver_step
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import StepProgram, build

Inputs = dict[str, Tensor]
Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = (320, 3, 256, 256)
NUM_GROUPS = 32
# Of the largest value: float32 statistics and products, and 16-bit storage's rounding.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-8}


def as_it_is(function: Function) -> Function:
    return function


@dataclass(frozen=True)
class Case:
    """goal: for the figure of `fused`. compiles: whether torch.compile is one of its baselines, which takes a while.

    formats: the memory formats that eager is timed in; the first one is the case's.
    """

    op: ClassVar[str]
    passes: ClassVar[int]
    explained: ClassVar[str]  # the op whose backend a row names
    unsliced: ClassVar[tuple[str, ...]] = ()  # inputs that are no matter of samples

    shape: tuple[int, ...]
    dtype: torch.dtype
    goal: Goal
    formats: tuple[str, ...] = ("contiguous", "channels_last")
    compiles: bool = True
    in_graph: bool = False

    @property
    def name(self) -> str:
        parts = [*self._kind(), "×".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        return ", ".join([*parts, self.formats[0], *(["in a graph"] if self.in_graph else [])])

    def _kind(self) -> list[str]:
        return []

    @property
    def x_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        return self.passes * self.x_bytes

    def inputs(self, device: str, memory_format: str) -> Inputs:
        """One set, of new random values."""
        raise NotImplementedError

    def fused(self, **inputs: Tensor) -> Any:
        raise NotImplementedError

    def composition(self, wrap: Wrap = as_it_is) -> Function:
        """Eager's function of a set's tensors; `wrap` may compile what it is made of."""
        raise NotImplementedError

    def prepared(self, function: Function, inputs: Inputs) -> Callable[[], Any]:
        return lambda: function(**inputs)

    def per_sample(self, result: Any) -> list[Tensor]:
        """Those of the results that have a value, or an image, for each sample."""
        return list(result) if isinstance(result, tuple) else [result]

    def expected(self, inputs: Inputs, samples: int) -> list[Tensor]:
        """The float64 reference's results for the first samples. `inputs` are left as they are."""
        part = {
            name: (value.detach() if name in self.unsliced else value.detach()[:samples]).clone()
            for name, value in inputs.items()
        }
        part = {name: value.double() if value.is_floating_point() else value for name, value in part.items()}
        with use_backend("reference"):
            return self.per_sample(self.prepared(self.fused, part)())

    def randn(self, device: str, memory_format: str) -> Tensor:
        x = torch.randn(self.shape, device=device, dtype=self.dtype)
        return x.contiguous(memory_format=FORMATS[memory_format])


@functools.cache
def process() -> GaussianProcess:
    return GaussianProcess(linear_betas(1000))


@functools.cache
def tables(device: torch.device) -> Any:
    return process().tables(device)


@dataclass(frozen=True)
class Noising(Case):
    """q_sample with noise of its own, which is not stored; eager's is drawn by randn_like."""

    op = explained = "q_sample"
    passes = 2
    unsliced = ("signal", "sigma")

    def _kind(self) -> list[str]:
        return ["noise generated"]

    def inputs(self, device: str, memory_format: str) -> Inputs:
        x0 = self.randn(device, memory_format)
        found = tables(x0.device) if device != "meta" else tables(torch.device("cpu"))
        signal, sigma = (table.to(device, self.dtype) for table in found[:2])
        return {"x0": x0, "t": torch.randint(0, 1000, self.shape[:1], device=device), "signal": signal, "sigma": sigma}

    def fused(self, x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return q_sample(x0, t, *tables(x0.device)[:2], seed=1)

    def composition(self, wrap: Wrap = as_it_is) -> Function:
        return wrap(eager.q_sample)


@dataclass(frozen=True)
class Loss(Case):
    """The loss and its gradient, ε computed again; eager reads the one that was stored."""

    op = explained = "diffusion_loss_and_grad"
    passes = 2

    def _kind(self) -> list[str]:
        return ["noise generated"]

    def inputs(self, device: str, memory_format: str) -> Inputs:
        output, noise = (self.randn(device, memory_format) for _ in range(2))
        t = torch.randint(0, 1000, self.shape[:1], device=device)
        return {"output": output.requires_grad_(), "t": t, "noise": noise}

    def fused(self, output: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        # Of "mse" of ε nothing but x0's shape is read.
        scale = 1 / self.shape[0]
        return diffusion_loss_and_grad(output.detach(), noise, t, tables(output.device), scale=scale, seed=1)

    def composition(self, wrap: Wrap = as_it_is) -> Function:
        loss, scale = wrap(eager.diffusion_loss), 1 / self.shape[0]
        return lambda output, t, noise: eager.diffusion_loss_and_grad(output, noise, scale, loss)


@functools.cache
def program(solver: str) -> StepProgram:
    return build(solver, process(), steps=None if solver == "ddpm" else Step.steps[solver])


@functools.cache
def eager_step(solver: str) -> Function:
    if solver == "ddpm":
        return eager.DDPMStep(process())
    return {"ddim": eager.DDIMStep, "dpmpp_2m": eager.DPMSolver2MStep}[solver](process(), Step.steps[solver])


@dataclass(frozen=True)
class Step(Case):
    """A row in the middle of a solver's program, "ddpm" with noise of its own; "dpmpp_2m" remembers an x0."""

    solver: str = "ddpm"

    op = explained = "solver_step"
    steps: ClassVar[dict[str, int]] = {"ddpm": 1000, "ddim": 50, "dpmpp_2m": 20}

    @property
    def passes(self) -> int:
        return 5 if self.solver == "dpmpp_2m" else 3

    @property
    def row(self) -> int:
        return self.steps[self.solver] // 2

    def _kind(self) -> list[str]:
        return [self.solver]

    def inputs(self, device: str, memory_format: str) -> Inputs:
        names = ("x", "output", *(["previous"] if self.solver == "dpmpp_2m" else []))
        return {name: self.randn(device, memory_format) for name in names}

    def fused(self, x: Tensor, output: Tensor, previous: Tensor | None = None) -> Any:
        if previous is not None:
            return solver_step(x, output, program(self.solver), self.row, slots=[previous]), previous
        source = {"seed": 1} if self.solver == "ddpm" else {}
        return solver_step(x, output, program(self.solver), self.row, **source)

    def composition(self, wrap: Wrap = as_it_is) -> Function:
        step, row = eager_step(self.solver), self.row
        return wrap(lambda x, output, **remembered: step(x, output, **remembered, row=row))


@dataclass(frozen=True)
class Norm(Case):
    """GroupNorm of 32 groups with SiLU. Eager's result goes back to x's memory format, as the next layer wants it."""

    op = explained = "group_norm"
    passes = 2
    unsliced = ("weight", "bias")

    def inputs(self, device: str, memory_format: str) -> Inputs:
        weight, bias = (torch.randn(self.shape[1], device=device, dtype=self.dtype) for _ in range(2))
        return {"x": self.randn(device, memory_format), "weight": weight, "bias": bias}

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, NUM_GROUPS, weight, bias, activation="silu")

    def composition(self, wrap: Wrap = as_it_is) -> Function:
        return wrap(normalised)


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = eager.group_norm(x, NUM_GROUPS, weight, bias, activation="silu")
    return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


@dataclass(frozen=True)
class NormBackward(Norm):
    """The gradients of x, weight and bias, the forward pass being done: x and dy are read, dx is written."""

    op = "group_norm_backward"
    passes = 3

    def inputs(self, device: str, memory_format: str) -> Inputs:
        return super().inputs(device, memory_format) | {"dy": self.randn(device, memory_format)}

    def prepared(self, function: Function, inputs: Inputs) -> Callable[[], Any]:
        *leaves, dy = (inputs[name].detach() for name in ("x", "weight", "bias", "dy"))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def per_sample(self, result: Any) -> list[Tensor]:
        return [result[0]]


@dataclass(frozen=True)
class RatioToEager(Norm):
    """Norm, of which the ratio is asked for."""

    def _kind(self) -> list[str]:
        return ["ratio to eager"]


@dataclass(frozen=True)
class Attention(Case):
    """Between feature maps. SDPA is given the heads' channels side by side, and its result goes back to q's format."""

    heads: int = 1

    op = explained = "attention"
    passes = 4

    def _kind(self) -> list[str]:
        return [f"{self.heads} heads", "ratio to SDPA"]

    def inputs(self, device: str, memory_format: str) -> Inputs:
        return {name: self.randn(device, memory_format) for name in ("q", "k", "v")}

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.flatten(2) for x in (q, k, v))
        return attention(*rows, self.heads, channels_last=False).unflatten(2, q.shape[2:])

    def composition(self, wrap: Wrap = as_it_is) -> Function:
        return wrap(functools.partial(attended, heads=self.heads))


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    rows = [x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*(x if x.stride(3) == 1 else x.contiguous() for x in rows))
    out = out.transpose(2, 3).flatten(1, 2).unflatten(2, q.shape[2:])
    return out.contiguous(memory_format=torch.contiguous_format if q.is_contiguous() else torch.channels_last)


# A slab of the first fits on chip, of the others not; the last is one whose x a Triton kernel reads twice.
FORWARD = {
    (256, 256, 16, 16): (0.80, 0.92),
    (256, 128, 32, 32): (0.80, 0.92),
    (64, 192, 64, 64): (0.70, 0.85),
    (64, 384, 32, 32): (0.70, 0.85),
    (16, 256, 256, 256): (0.62, 0.80),
}
BACKWARD = (0.65, 0.85)
LONE = [(1, 128, 32, 32), (1, 256, 16, 16)]
# Whole rows of scores on chip, beside SDPA with its copies; and long rows, beside SDPA without.
SHORT_ROWS = [((64, 256, 16, 16), 32), ((64, 256, 16, 16), 4), ((64, 256, 16, 16), 1), ((16, 512, 16, 16), 1)]
LONG_ROWS = [((16, 512, 32, 32), 8), ((8, 320, 64, 64), 8), ((8, 512, 32, 32), 4), ((4, 512, 32, 32), 1)]
BOTH_ORDERS = (("channels_last", "contiguous"), ("contiguous", "channels_last"))


def cases() -> Iterator[Case]:
    half, full = torch.bfloat16, torch.float32
    yield Noising(IMAGES, full, Goal("share", 0.90, 0.95))
    yield Noising(IMAGES, half, Goal("share", 0.65, 0.80))
    yield Step(IMAGES, full, Goal("share", 0.90, 0.96), solver="ddpm")
    yield Step(IMAGES, half, Goal("share", 0.80, 0.90), solver="ddpm")
    for solver, dtype in itertools.product(("ddim", "dpmpp_2m"), (full, half)):
        yield Step(IMAGES, dtype, Goal("share", 0.92, 0.97), solver=solver)
    for dtype in (full, half):
        yield Loss(IMAGES, dtype, Goal("share", 0.80, 0.90))
    for (shape, bounds), formats in itertools.product(FORWARD.items(), BOTH_ORDERS):
        yield Norm(shape, half, Goal("share", *bounds), formats, compiles=formats[0] == "channels_last")
    for shape, formats in itertools.product(FORWARD, BOTH_ORDERS):
        compiles = formats[0] == "channels_last" and shape[0] != 16
        yield NormBackward(shape, half, Goal("share", *BACKWARD), formats, compiles)
    for shape, formats in itertools.product(LONE, BOTH_ORDERS):
        yield Norm(shape, half, Goal("us", 4.0, 2.5), formats, compiles=False, in_graph=True)
    yield RatioToEager((256, 128, 32, 32), half, Goal("ratio", 3.2, 4.1), ("channels_last",), compiles=False)
    for shape, heads in SHORT_ROWS:
        yield Attention(shape, half, Goal("ratio", 1.3, 1.6), ("contiguous",), compiles=False, heads=heads)
    for shape, heads in LONG_ROWS:
        yield Attention(shape, half, Goal("ratio", 0.95, 1.05), ("channels_last",), compiles=False, heads=heads)
