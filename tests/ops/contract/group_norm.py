"""group_norm with and without each of its parts."""

from __future__ import annotations

import torch

from diffkern.ops import group_norm
from tests.ops import oracles
from tests.ops.cases import STORAGE
from tests.ops.contract.case import Inputs, OpCase, Results, Spec


def _group_norm(
    name: str, groups: str, parameters: tuple[str, ...], *, silu: bool, ones: bool = False, skip: bool = False
) -> OpCase:
    """`groups`: "one", "all" (as many as channels), or "some"; `ones`: (N, C) parameters have x's rank.

    `skip`: there is a second tensor of as many channels as x and one more.
    """

    def make(spec: Spec) -> Inputs:
        samples, x_channels, *rest = spec.shape
        channels = x_channels + (x_channels + 1) * skip
        some = next((g for g in range(2, channels) if channels % g == 0), 1)
        inputs: Inputs = {
            "x": spec.first(),
            "num_groups": {"one": 1, "all": channels, "some": some}[groups],
            "eps": 1e-5,
            "activation": "silu" if silu else None,
        }
        for seed, parameter in enumerate(parameters, start=2):
            shape = (channels,) if parameter in ("weight", "bias") else (samples, channels, *([1] * len(rest) * ones))
            inputs[parameter] = spec.operand(parameter, shape, seed)
        if skip:
            inputs["skip"] = spec.operand("skip", (samples, x_channels + 1, *rest), 9)
        return inputs

    def formula(inputs: Inputs) -> Results:
        x, num_groups = inputs["x"], inputs["num_groups"]
        arguments = [num_groups, inputs.get("weight"), inputs.get("bias"), inputs["eps"]]
        arguments += [inputs.get("scale"), inputs.get("shift"), silu, inputs.get("skip"), inputs.get("offset")]
        return ((oracles.group_norm if x.dtype == torch.float64 else oracles.eager_group_norm)(x, *arguments),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (group_norm(**inputs),),
        formula=formula,
        differentiable=("x", *parameters, *["skip"] * skip),
        per_sample=("x", *(p for p in parameters if p in ("offset", "scale", "shift")), *["skip"] * skip),
        allowed=lambda dtype: dict.fromkeys(parameters, (dtype,) if dtype == torch.float64 else (dtype, torch.float32)),
        min_rank=2,
        # Of one value, x̂ is 0, and of two it is ±1, whatever x is (test_group_norm_gradients.py).
        cancels=lambda inputs: ("x",) * ((1 + skip) * inputs["x"].shape[1:].numel() <= 2 * inputs["num_groups"]),
        native_dtypes=STORAGE,
    )


CASES = [
    _group_norm("group_norm plain", "some", (), silu=False),
    _group_norm("group_norm SiLU alone", "all", (), silu=True),
    _group_norm("group_norm affine", "one", ("weight", "bias"), silu=False),
    _group_norm("group_norm all", "some", ("weight", "bias", "scale", "shift"), silu=True),
    _group_norm("group_norm scale-shift", "all", ("scale", "shift"), silu=False, ones=True),
    _group_norm("group_norm weight and shift", "one", ("weight", "shift"), silu=True),
]

# In a list of their own, as the combinations of a case are drawn by its place among all.
JOINED = [
    _group_norm("group_norm offset", "some", ("weight", "bias", "offset"), silu=True),
    _group_norm("group_norm skip and offset", "some", ("weight", "offset"), silu=False, ones=True, skip=True),
]
