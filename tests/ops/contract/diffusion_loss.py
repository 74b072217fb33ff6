"""diffusion_loss against each target, and the one pass that gives its gradient too."""

from __future__ import annotations

import torch

from diffkern.ops import diffusion_loss, diffusion_loss_and_grad
from diffkern.process.gaussian import ProcessTables
from tests.ops import oracles
from tests.ops.cases import DTYPES, STORAGE, in_layout, randn
from tests.ops.contract.case import Inputs, OpCase, Results, Spec
from tests.ops.contract.philox import exact_normals
from tests.ops.contract.q_sample import COUNTER, TABLES
from tests.ops.guarded import Guarded


def _diffusion_loss(target: str, *, counter: bool = False, weighted: bool = False, one_pass: bool = False) -> OpCase:
    """`one_pass` is diffusion_loss_and_grad."""
    reads_x0, reads_noise = target != "eps", target != "x0"

    def make(spec: Spec) -> Inputs:
        """Nine timesteps, so that samples share some and leave others out."""
        single = torch.float64 if spec.dtype == torch.float64 else torch.float32
        inputs: Inputs = {"model_output": spec.first(), "x0": spec.operand("x0", spec.shape, 2)}
        inputs["t"] = (torch.arange(2 * spec.shape[0]) * 5 + 8)[::2] % 9
        inputs |= {name: table[::120].to(spec.dtypes.get(name, torch.float64)) for name, table in TABLES.items()}
        if weighted:
            weight = randn(spec.shape[0], seed=3, dtype=spec.dtypes.get("weight", single))
            inputs["weight"] = in_layout(weight, spec.other)
        if one_pass:
            inputs["scale"] = torch.tensor(0.75, dtype=spec.dtypes.get("scale", spec.dtype))
        if counter:
            samples = [COUNTER["samples"] + n for n in range(spec.shape[0])]
            inputs["noise"] = exact_normals(spec.shape, **(COUNTER | {"samples": samples}))
        elif reads_noise:
            inputs["noise"] = spec.operand("noise", spec.shape, 4)
        return inputs

    def call(inputs: Inputs, memory: Guarded | None) -> Results:
        arguments = {k: v for k, v in inputs.items() if k not in TABLES and not (counter and k == "noise")}
        arguments |= {"tables": ProcessTables(*(inputs[name] for name in TABLES)), "target": target}
        if counter:
            arguments |= COUNTER
        return diffusion_loss_and_grad(**arguments) if one_pass else (diffusion_loss(**arguments),)

    def formula(inputs: Inputs) -> Results:
        output, x0, t, signal, sigma = (inputs[k] for k in ("model_output", "x0", "t", *TABLES))
        rest = (x0, t, signal, sigma, inputs.get("noise", x0), target, inputs.get("weight"), output.dtype)
        if not one_pass:
            return (oracles.diffusion_loss(output, *rest),)
        leaf = output.detach().requires_grad_()
        loss = oracles.diffusion_loss(leaf, *rest)
        (gradient,) = torch.autograd.grad(inputs["scale"] * loss.sum(), leaf)
        return loss.detach(), gradient

    weights = ("weight",) * weighted
    per_sample = ("model_output", *("x0",) * reads_x0, *("noise",) * (reads_noise and not counter), *weights)
    wide = (torch.float64, torch.float32)
    allowed = dict.fromkeys(per_sample[1:], DTYPES) | dict.fromkeys(weights, wide)
    allowed |= dict.fromkeys(TABLES, wide) if target == "v" else {}
    allowed |= {"scale": DTYPES} if one_pass else {}
    return OpCase(
        f"diffusion_loss{'_and_grad' * one_pass} {target}{' counter' * counter}",
        make=make,
        call=call,
        formula=formula,
        differentiable=() if one_pass else (*per_sample, *(TABLES if target == "v" else ())),
        per_sample=per_sample,
        reduced_results=1,
        for_formula=("noise",) if counter else (),
        allowed=lambda dtype: allowed,
        native_dtypes=STORAGE,
    )


CASES = [
    _diffusion_loss("eps"),
    _diffusion_loss("eps", counter=True),
    _diffusion_loss("v", weighted=True),
    _diffusion_loss("v", counter=True),
    _diffusion_loss("x0"),
    _diffusion_loss("eps", counter=True, weighted=True, one_pass=True),
]
