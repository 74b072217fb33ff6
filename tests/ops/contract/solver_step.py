"""solver_step with programs of every kind (../programs.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops import solver_step
from diffkern.solvers.program import StepProgram
from tests.ops import oracles, programs
from tests.ops.cases import DTYPES, in_layout, memory_format, randn
from tests.ops.contract.case import Inputs, OpCase, Results, Spec
from tests.ops.contract.philox import exact_normals
from tests.ops.guarded import Guarded


def _solver_step(
    name: str, program: StepProgram, *, guided: bool = False, rescale: float | None = None, counter: bool = False,
    per_sample_rows: bool = True, differentiable: bool = True, hides: bool = False,
) -> OpCase:  # fmt: skip
    reads_extra = bool((program.column("c_e") != 0).any() or (program.column("c_v") != 0).any())

    def rows(samples: int) -> list[int]:
        return [(2 * n + 1) % 3 for n in range(samples)] if per_sample_rows else [1] * samples

    def make(spec: Spec) -> Inputs:
        samples, *rest = spec.shape
        if program.variance != "fixed":
            rest[0] *= 2
        inputs: Inputs = {
            "x": spec.first(),
            "model_output": spec.operand("model_output", (samples * (2 if guided else 1), *rest), 2),
            "row": torch.tensor(rows(samples), dtype=torch.int64) if per_sample_rows else 1,
        }
        if guided:
            inputs["guidance_scale"] = torch.linspace(-1.5, 3.5, samples, dtype=torch.float64)
        if reads_extra:
            inputs["extra"] = spec.operand("extra", spec.shape, 3)
        if counter:
            numbers = [7 + n for n in range(samples)]
            normals = [
                exact_normals((1, *spec.shape[1:]), 5, r, [n], 2) for r, n in zip(rows(samples), numbers, strict=True)
            ]
            inputs["noise"] = torch.cat(normals) if normals else torch.empty(spec.shape, dtype=torch.float64)
        else:
            inputs["noise"] = spec.operand("noise", spec.shape, 4)
        if program.num_slots:
            # Slots are written, so no two of their elements may be the same.
            layout = "contiguous" if spec.other == "broadcast" else spec.other
            inputs["slots"] = in_layout(randn(program.num_slots, *spec.shape, seed=5, dtype=spec.dtype), layout)
        return inputs

    def call(inputs: Inputs, memory: Guarded | None) -> Results:
        arguments = dict(inputs)
        if counter:
            del arguments["noise"]
            arguments |= {"seed": 5, "samples": 7}
        if program.num_slots:
            slots = inputs["slots"]
            arguments["slots"] = slots.clone() if memory is None else memory.writable(slots)
        wants_grad = any(isinstance(v, Tensor) and v.requires_grad for v in inputs.values())
        if memory is not None and not wants_grad:
            x = inputs["x"]
            like = x if memory_format(x) == "channels_last" else x.contiguous()
            arguments["out"] = torch.empty_like(like)
        x_next = solver_step(program=program, guidance_rescale=rescale, **arguments)
        results = x_next if isinstance(x_next, tuple) else (x_next,)
        if "out" in arguments:
            assert results[0] is arguments["out"]
        return (*results, *(arguments["slots"].unbind(0) if program.num_slots else ()))

    def formula(inputs: Inputs) -> Results:
        x, guidance = inputs["x"], inputs["guidance_scale"].tolist() if guided else None
        named = {k: inputs[k] for k in ("model_output", "slots", "extra", "noise") if k in inputs}
        x_next, x_in, slots = oracles.solver_step(
            x, program=program, rows=rows(x.shape[0]), guidance=guidance, rescale=rescale, dtype=x.dtype, **named
        )
        return (x_next, *([x_in] if program.scales_input else []), *([] if slots is None else slots.unbind(0)))

    gradients = ("x", "model_output", *(["extra"] if reads_extra else []))
    operands = ("model_output", *(["extra"] if reads_extra else []), *([] if counter else ["noise"]))
    return OpCase(
        f"solver_step {name}",
        make=make,
        call=call,
        formula=formula,
        differentiable=gradients if differentiable else (),
        per_sample=gradients,
        differentiable_results=2 if program.scales_input else 1,
        buffers=("slots",) if program.num_slots else (),
        for_formula=("noise",) if counter else (),
        allowed=lambda dtype: dict.fromkeys(operands, DTYPES),
        min_rank=1 if program.variance == "fixed" else 2,
        hides=hides,
    )


CASES = [
    _solver_step("plain", programs.PLAIN, per_sample_rows=False),
    _solver_step("clipped, guided", programs.CLIPPED, guided=True),
    _solver_step("counter", programs.CLIPPED, counter=True),
    _solver_step("learned range", programs.LEARNED_RANGE, guided=True, per_sample_rows=False),
    # Where x0 meets its own quantile the gradient jumps: which side it is on is a matter of rounding.
    _solver_step("threshold", programs.THRESHOLD, differentiable=False, hides=True),
    _solver_step("multistep", programs.MULTISTEP),
]
