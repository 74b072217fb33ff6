"""Calls of solver_step with everything that a program reads, and the same call to the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.ops import solver_step
from diffkern.solvers.program import StepProgram
from tests.ops import oracles
from tests.ops.cases import in_layout, randn


@dataclass
class Call:
    """The operands of one step; `rows` one row for all samples or one a sample."""

    program: StepProgram
    rows: int | list[int]
    x: Tensor
    model_output: Tensor
    slots: Tensor | None
    guidance: float | list[float] | None
    rescale: float | None
    extra: Tensor | None
    noise: Tensor

    def run(self, **options) -> Tensor | tuple[Tensor, Tensor]:
        """With the given noise, unless `options` names another source."""
        if not {"seed", "generator", "noise"} & options.keys():
            options["noise"] = self.noise
        options.setdefault("slots", self.slots)
        options.setdefault("extra", self.extra)
        guidance = torch.tensor(self.guidance) if isinstance(self.guidance, list) else self.guidance
        row = torch.tensor(self.rows) if isinstance(self.rows, list) else self.rows
        return solver_step(
            self.x,
            self.model_output,
            self.program,
            row,
            guidance_scale=guidance,
            guidance_rescale=self.rescale,
            **options,
        )

    def oracle(self, dtype: torch.dtype = torch.float64, **replaced) -> tuple[Tensor, Tensor, Tensor | None]:
        n = self.x.shape[0]
        rows = self.rows if isinstance(self.rows, list) else [self.rows] * n
        guidance = self.guidance
        if guidance is not None and not isinstance(guidance, list):
            guidance = [guidance] * n
        operands = {
            "x": self.x,
            "model_output": self.model_output,
            "slots": self.slots,
            "extra": self.extra,
            "noise": self.noise,
        } | replaced
        x, output = operands.pop("x"), operands.pop("model_output")
        return oracles.solver_step(
            x, output, self.program, rows, guidance=guidance, rescale=self.rescale, dtype=dtype, **operands
        )

    def operands(self) -> list[Tensor | None]:
        return [self.x, self.model_output, self.extra, self.noise]


def make(
    program: StepProgram,
    shape: tuple[int, ...],
    rows: int | list[int] = 0,
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    guidance: float | list[float] | None = None,
    rescale: float | None = None,
) -> Call:
    n = shape[0]
    output_shape = [n * (1 if guidance is None else 2), *shape[1:]]
    if program.variance != "fixed":
        output_shape[1] *= 2
    tensors = {
        "x": randn(*shape, seed=1),
        "model_output": randn(*output_shape, seed=2).to(output_dtype or dtype),
        "extra": randn(*shape, seed=3),
        "noise": randn(*shape, seed=4),
    }
    tensors = {k: in_layout(v if k == "model_output" else v.to(dtype), layout) for k, v in tensors.items()}
    slots = None
    if program.num_slots:
        kept = [in_layout(randn(*shape, seed=5 + k).to(dtype), "contiguous") for k in range(program.num_slots)]
        slots = torch.stack(kept)
    extra = tensors.pop("extra")
    reads_extra = bool((program.column("c_e") != 0).any() or (program.column("c_v") != 0).any())
    return Call(
        program, rows, slots=slots, guidance=guidance, rescale=rescale, extra=extra if reads_extra else None, **tensors
    )
