"""philox_normal and philox_uint32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.ops import philox_normal, philox_uint32
from tests.ops import philox
from tests.ops.contract.case import Inputs, OpCase, Results, Spec


def exact_normals(shape: tuple[int, ...], seed: int, draw: int, samples: list[int], stream: int) -> Tensor:
    """The exact function of the integers, float64."""
    size = math.prod(shape[1:])
    whole = (shape[0], -(-size // 4) * 4)
    words = philox.expected_words(whole, seed, draw, samples, stream)
    return torch.from_numpy(philox.exact_normals(words)).reshape(whole)[:, :size].reshape(shape)


FORMATS = {("channels_last", 4): torch.channels_last, ("channels_last", 5): torch.channels_last_3d}


def _philox_inputs(spec: Spec) -> Inputs:
    samples = torch.arange(2 * spec.shape[0] + 3)[3::2]
    return {"shape": spec.shape, "seed": torch.tensor(-3), "draw": torch.tensor(4), "samples": samples, "stream": 1}


def _normal_inputs(spec: Spec) -> Inputs:
    memory_format = FORMATS.get((spec.layout, len(spec.shape)), torch.contiguous_format)
    return _philox_inputs(spec) | {"dtype": spec.dtype, "memory_format": memory_format}


def _normal_formula(inputs: Inputs) -> Results:
    samples = inputs["samples"].tolist()
    return (exact_normals(tuple(inputs["shape"]), 2**64 - 3, 4, samples, 1),)


def _words_formula(inputs: Inputs) -> Results:
    words = philox.expected_words(tuple(inputs["shape"]), 2**64 - 3, 4, inputs["samples"].tolist(), 1)
    return (torch.from_numpy(words),)


CASES = [
    OpCase(
        "philox_normal",
        make=_normal_inputs,
        call=lambda inputs, memory: (philox_normal(**inputs),),
        formula=_normal_formula,
    ),
    OpCase(
        "philox_uint32",
        make=_philox_inputs,
        call=lambda inputs, memory: (philox_uint32(**inputs),),
        formula=_words_formula,
    ),
]
