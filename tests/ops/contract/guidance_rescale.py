"""guidance_rescale; [u; c] with what the values say in c."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops import guidance_rescale
from tests.ops import oracles
from tests.ops.cases import in_layout
from tests.ops.contract.case import Inputs, OpCase, Results, Spec
from tests.ops.guarded import Guarded

PHI = 0.7


def _make(spec: Spec) -> Inputs:
    halves = [spec.operand("model_output", spec.shape, 2), spec.first()]
    # Never 1: then m is c but for rounding, and where c is constant r the ratio of two such deviations.
    scale = torch.linspace(-1.5, 3.4, spec.shape[0], dtype=torch.float64)
    return {"model_output": in_layout(torch.cat(halves), spec.layout), "guidance_scale": scale}


def _call(inputs: Inputs, memory: Guarded | None) -> Results:
    return (_rounded(guidance_rescale(**inputs, phi=PHI), inputs),)


def _formula(inputs: Inputs) -> Results:
    output, scale = inputs["model_output"], inputs["guidance_scale"]
    return (_rounded(oracles.guidance_rescale(output, scale.to(output.dtype), PHI), inputs),)


def _rounded(result: Tensor, inputs: Inputs) -> Tensor:
    """To the precision that a step computes in, in which it is used."""
    return result if inputs["model_output"].dtype == torch.float64 else result.float()


CASES = [
    OpCase(
        "guidance_rescale",
        make=_make,
        call=_call,
        formula=_formula,
        differentiable=("model_output",),
        per_sample=("model_output",),
        reduced_results=1,
    )
]
