"""linear_attention with and without memory, over the pixels of an image whose every channel has its q, k and v."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffkern.ops import linear_attention
from tests.ops import oracles
from tests.ops.cases import STORAGE
from tests.ops.contract.case import SHAPES, Inputs, OpCase, Results, Spec

# With more channels where there are many pixels: the largest of few sums over thousands says nothing of their rounding.
SHAPES_OF_IMAGES = tuple((1, 12, 70, 67) if shape == (1, 3, 70, 67) else shape for shape in SHAPES if len(shape) > 1)


def _linear_attention(name: str, memory: int | None) -> OpCase:
    """`memory`: keys that stand before every sample's."""

    def make(spec: Spec) -> Inputs:
        samples, channels, *rest = spec.shape
        heads = next((h for h in (3, 2) if channels % h == 0), 1)
        packed = replace(spec, shape=(samples, 3 * channels, torch.Size(rest).numel()))
        inputs: Inputs = {"qkv": packed.first(), "num_heads": heads}
        if memory is not None:
            inputs["memory"] = spec.operand("memory", (2, heads, channels // heads, memory), 2)
        return inputs

    def formula(inputs: Inputs) -> Results:
        return (oracles.linear_attention(inputs["qkv"], inputs["num_heads"], inputs.get("memory")),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (linear_attention(**inputs),),
        formula=formula,
        differentiable=("qkv", "memory")[: 1 if memory is None else 2],
        per_sample=("qkv",),
        allowed=lambda dtype: dict.fromkeys(
            () if memory is None else ("memory",), (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
        ),
        min_rank=2,
        of_shapes=SHAPES_OF_IMAGES,
        native_dtypes=STORAGE,
    )


CASES = [_linear_attention("linear_attention", None), _linear_attention("linear_attention memory", 4)]
