"""q_sample with given noise and with a counter."""

from __future__ import annotations

import torch

from diffkern.ops import q_sample
from tests.ops import oracles
from tests.ops.cases import DTYPES
from tests.ops.contract.case import Inputs, OpCase, Results, Spec
from tests.ops.contract.philox import exact_normals
from tests.ops.guarded import Guarded

COUNTER = {"seed": 2**63 + 5, "draw": 3, "samples": 2**33, "stream": 9}
TABLES = dict(
    zip(("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"), oracles.alphas_cumprod_tables(), strict=True)
)


def _q_sample_inputs(spec: Spec) -> Inputs:
    """Nine timesteps, so that samples share some and leave others out."""
    tables = {name: table[::120].to(spec.dtypes.get(name, torch.float64)) for name, table in TABLES.items()}
    t = (torch.arange(2 * spec.shape[0]) * 5 + 8)[::2] % 9
    return {"x0": spec.first(), "t": t, **tables, "noise": spec.operand("noise", spec.shape, 2)}


def _q_sample_counter_inputs(spec: Spec) -> Inputs:
    """The noise is the oracle's."""
    samples = [COUNTER["samples"] + n for n in range(spec.shape[0])]
    return _q_sample_inputs(spec) | {"noise": exact_normals(spec.shape, **(COUNTER | {"samples": samples}))}


def _q_sample_counter(inputs: Inputs, memory: Guarded | None) -> Results:
    return q_sample(**{k: v for k, v in inputs.items() if k != "noise"}, **COUNTER, return_noise=True)


def _q_sample_formula(inputs: Inputs) -> Results:
    x0, t, signal, sigma, noise = inputs.values()
    return (oracles.q_sample(x0, t, signal, sigma, noise, x0.dtype),)


CASES = [
    OpCase(
        "q_sample given noise",
        make=_q_sample_inputs,
        call=lambda inputs, memory: (q_sample(**inputs),),
        formula=_q_sample_formula,
        differentiable=("x0", *TABLES, "noise"),
        per_sample=("x0", "noise"),
        allowed=lambda dtype: {"noise": DTYPES, **dict.fromkeys(TABLES, (torch.float64, torch.float32))},
    ),
    OpCase(
        "q_sample counter",
        make=_q_sample_counter_inputs,
        call=_q_sample_counter,
        formula=lambda inputs: (*_q_sample_formula(inputs), inputs["noise"]),
        for_formula=("noise",),
        differentiable=("x0", *TABLES),
        per_sample=("x0",),
    ),
]
