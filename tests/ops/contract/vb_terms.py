"""vb_terms and the losses made of it: every target and variance in some form, both decoders, each source of x_t."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, vb_terms
from diffkern.process import GaussianProcess, linear_betas
from diffkern.process.gaussian import ProcessTables
from tests.ops import bound_oracle
from tests.ops.cases import DTYPES, STORAGE
from tests.ops.contract.case import Inputs, OpCase, Results, Spec
from tests.ops.contract.philox import exact_normals
from tests.ops.contract.q_sample import COUNTER
from tests.ops.guarded import Guarded

TABLES = GaussianProcess(linear_betas(1000)).keep(range(0, 1000, 120)).tables()._asdict()
del TABLES["variance"]
LEADING = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


def _inputs(spec: Spec, variance: str, source: str) -> Inputs:
    """Nine timesteps. The first of several samples is at t = 0, where not finite values are in another, and none are so
    large that the oracle's logarithms have no gradient."""
    doubled = (spec.shape[0], 2 * spec.shape[1], *spec.shape[2:]) if variance.startswith("learned") else spec.shape
    inputs: Inputs = {"model_output": replace(spec, shape=doubled).first(), "x0": spec.operand("x0", spec.shape, 2)}
    t = (torch.arange(2 * spec.shape[0]) * 5 + 8)[::2] % 8 + 1
    if len(t) > 1 and spec.values not in ("mean 1e3", "near 6e4"):
        t[0] = 0
    inputs["t"] = t
    inputs |= {name: table.to(spec.dtypes.get(name, torch.float64)) for name, table in TABLES.items()}
    if source == "counter":
        samples = [COUNTER["samples"] + n for n in range(spec.shape[0])]
        inputs["noise"] = exact_normals(spec.shape, **(COUNTER | {"samples": samples}))
    elif source != "none":
        inputs[source] = spec.operand(source, spec.shape, 4)
    return inputs


def _called_with(inputs: Inputs, counter: bool) -> Inputs:
    arguments = {k: v for k, v in inputs.items() if k not in TABLES and not (counter and k == "noise")}
    arguments["tables"] = ProcessTables(**{name: inputs[name] for name in TABLES})
    return arguments | (COUNTER if counter else {})


def _vb_terms(target: str, variance: str, source: str, *, tables: bool = False, **options: object) -> OpCase:
    """`source` is "noise", "x_t", "counter" or "none"; `tables`: whether their gradients are looked at."""

    def call(inputs: Inputs, memory: Guarded | None) -> Results:
        arguments = _called_with(inputs, source == "counter")
        return tuple(vb_terms(**arguments, target=target, variance=variance, **options))

    def formula(inputs: Inputs) -> Results:
        arguments = _called_with(inputs, False)
        if source == "none":
            arguments["noise"] = inputs["x0"]
        return bound_oracle.vb_terms(**arguments, target=target, variance=variance, **options)

    given = (source,) if source in ("noise", "x_t") else ()
    reads_x0 = target != "eps" or source == "x_t"
    per_sample = ("model_output", *("x0",) * reads_x0, *given)
    return OpCase(
        f"vb_terms {target} {variance} {source} {' '.join(options)}".strip(),
        make=lambda spec: _inputs(spec, variance, source),
        call=call,
        formula=formula,
        differentiable=(*per_sample, *(LEADING if tables else ())),
        per_sample=per_sample,
        differentiable_results=3,
        reduced_results=3,
        for_formula=("noise",) if source == "counter" else (),
        # Two of the seven tables stand for all: every combination of these types is run.
        allowed=lambda dtype: (
            dict.fromkeys(("x0", *given), DTYPES) | dict.fromkeys(("posterior_mean_coef1", "log_betas"), DTYPES[::3])
        ),
        min_rank=2 if variance.startswith("learned") else 1,
        native_dtypes=STORAGE,
    )


def _loss(loss: str, variance: str, *, one_pass: bool) -> OpCase:
    """diffusion_loss, or diffusion_loss_and_grad if `one_pass`, of an eps network with noise from a counter."""

    def call(inputs: Inputs, memory: Guarded | None) -> Results:
        arguments = _called_with(inputs, True) | {"loss": loss, "variance": variance, "levels": 17}
        return diffusion_loss_and_grad(**arguments) if one_pass else (diffusion_loss(**arguments),)

    def formula(inputs: Inputs) -> Results:
        rest = {k: v for k, v in inputs.items() if k not in ("weight", "scale")}
        leaf = inputs["model_output"].detach().requires_grad_() if one_pass else inputs["model_output"]
        arguments = _called_with(rest, False) | {"model_output": leaf}
        stops = loss in ("hybrid", "rescaled_mse")
        terms = bound_oracle.vb_terms(**arguments, target="eps", variance=variance, levels=17, stops_mean=stops)
        steps = len(TABLES["log_betas"])
        factors = {"kl": (0, 1), "rescaled_kl": (0, steps), "hybrid": (1, 1), "rescaled_mse": (1, steps / 1000)}
        of_mse, of_vb = factors[loss]
        value = inputs["weight"].to(leaf.dtype) * (of_vb * terms[0] + (of_mse * terms[1] if of_mse else 0))
        if not one_pass:
            return (value,)
        (gradient,) = torch.autograd.grad(inputs["scale"] * value.sum(), leaf)
        return value.detach(), gradient

    def make(spec: Spec) -> Inputs:
        inputs = _inputs(spec, variance, "counter")
        inputs["weight"] = spec.operand("weight", spec.shape[:1], 3).double()
        return inputs | ({"scale": torch.tensor(0.75, dtype=spec.dtype)} if one_pass else {})

    per_sample = ("model_output", "weight")
    return OpCase(
        f"diffusion_loss{'_and_grad' * one_pass} {loss} {variance}",
        make=make,
        call=call,
        formula=formula,
        differentiable=() if one_pass else per_sample,
        per_sample=per_sample,
        reduced_results=1,
        for_formula=("noise",),
        min_rank=2 if variance.startswith("learned") else 1,
        native_dtypes=STORAGE,
    )


CASES = [
    _vb_terms("eps", "fixed_large", "noise", tables=True),
    _vb_terms("v", "learned_range", "counter"),
    _vb_terms("x_prev", "learned", "x_t", levels=17),
    _vb_terms("x0", "fixed_small", "none", decoder="exact"),
    _vb_terms("flow", "learned_range", "noise", decoder="exact", levels=17),
    _vb_terms("eps", "learned_range", "x_t", clip=(-1.0, 1.0)),
    _loss("rescaled_mse", "learned_range", one_pass=False),
    _loss("hybrid", "learned", one_pass=True),
    _loss("kl", "fixed_small", one_pass=True),
]
