"""dynamic_threshold with and without guidance. Its gradients jump where two values change places, so they have tests of
their own (../test_dynamic_threshold.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.ops import dynamic_threshold
from tests.ops import oracles, programs
from tests.ops.cases import DTYPES
from tests.ops.contract.case import Inputs, OpCase, Results, Spec
from tests.ops.guarded import Guarded

PROGRAM = programs.program(3, threshold=(0.9, 1e4))


def _dynamic_threshold(name: str, *, guided: bool) -> OpCase:
    def make(spec: Spec) -> Inputs:
        samples, *rest = spec.shape
        inputs: Inputs = {
            "x": spec.first(),
            "model_output": spec.operand("model_output", (samples * (2 if guided else 1), *rest), 2),
            "row": (torch.arange(2 * samples) * 2 + 1)[::2] % programs.ROWS,
        }
        if guided:
            inputs["guidance_scale"] = torch.linspace(-1.5, 3.5, samples, dtype=torch.float64)
            inputs["rescale"] = torch.linspace(0.5, 1.5, samples, dtype=torch.float64)
        return inputs

    def call(inputs: Inputs, memory: Guarded | None) -> Results:
        return (_rounded(dynamic_threshold(**inputs, program=PROGRAM), inputs["x"]),)

    def formula(inputs: Inputs) -> Results:
        s = oracles.dynamic_threshold(**inputs, program=PROGRAM, dtype=inputs["x"].dtype)
        return (_rounded(s, inputs["x"]),)

    return OpCase(
        f"dynamic_threshold{name}",
        make=make,
        call=call,
        formula=formula,
        reduced_results=1,
        allowed=lambda dtype: {"model_output": DTYPES},
        hides=True,
    )


def _rounded(result: Tensor, x: Tensor) -> Tensor:
    """To the precision that a step computes in, in which it is used."""
    return result if x.dtype == torch.float64 else result.float()


CASES = [_dynamic_threshold("", guided=False), _dynamic_threshold(" guided", guided=True)]
