"""channel_rms_norm with and without each of its parts."""

from __future__ import annotations

import torch

from diffkern.ops import channel_rms_norm
from tests.ops import oracles
from tests.ops.cases import STORAGE
from tests.ops.contract.case import Inputs, OpCase, Results, Spec


def _channel_rms_norm(name: str, parameters: tuple[str, ...], *, eps: float, silu: bool, ones: bool = False) -> OpCase:
    """`ones`: scale and shift have x's rank."""

    def make(spec: Spec) -> Inputs:
        samples, channels, *rest = spec.shape
        inputs: Inputs = {"x": spec.first(), "eps": eps, "activation": "silu" if silu else None}
        for seed, parameter in enumerate(parameters, start=2):
            shape = (channels,) if parameter == "weight" else (samples, channels, *([1] * len(rest) * ones))
            inputs[parameter] = spec.operand(parameter, shape, seed)
        return inputs

    def formula(inputs: Inputs) -> Results:
        x, given = inputs["x"], [inputs.get(parameter) for parameter in ("weight", "scale", "shift")]
        return (oracles.channel_rms_norm(x, given[0], eps, *given[1:], silu, x.dtype),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (channel_rms_norm(**inputs),),
        formula=formula,
        differentiable=("x", *parameters),
        per_sample=("x", *(p for p in parameters if p in ("scale", "shift"))),
        allowed=lambda dtype: dict.fromkeys(parameters, (dtype,) if dtype == torch.float64 else (dtype, torch.float32)),
        min_rank=2,
        cancels=lambda inputs: ("x",) * (inputs["x"].shape[1] == 1),  # of one value, x/‖x‖ is ±1 whatever x is
        native_dtypes=STORAGE,
    )


CASES = [
    _channel_rms_norm("channel_rms_norm all", ("weight", "scale", "shift"), eps=1e-12, silu=True),
    _channel_rms_norm("channel_rms_norm scale-shift", ("scale", "shift"), eps=2.0, silu=False, ones=True),
]
