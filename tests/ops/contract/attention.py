"""attention and attention_qkv over the pixels of an image: both orders of the axes, all orders of packed channels."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffkern.ops import attention, attention_qkv
from tests.ops import oracles
from tests.ops.cases import STORAGE
from tests.ops.contract.case import SHAPES, Inputs, OpCase, Results, Spec

# As many keys as pixels: their number is squared. And self-attention of one pixel has no gradient but that of v.
SHAPES_OF_IMAGES = tuple(
    (1, 24, 17, 19) if shape == (1, 3, 70, 67) else shape for shape in SHAPES if torch.Size(shape[2:]).numel() != 1
)

# Of values far from 0 the scores are so large that their rounding is all that a softmax would see.
SCALES = {"mean 1e3": 1e-4, "near 6e4": 1e-9}


def shaped(spec: Spec, channels: int, channels_last: bool, length: int | None = None) -> tuple[int, int, int]:
    """(N, length, channels), or with the last two turned; a length of as many as there are pixels if none is given."""
    samples, length = spec.shape[0], pixels(spec) if length is None else length
    return (samples, length, channels) if channels_last else (samples, channels, length)


def pixels(spec: Spec) -> int:
    return torch.Size(spec.shape[2:]).numel()


def heads_of(channels: int) -> int:
    return next((heads for heads in (3, 2) if channels % heads == 0), 1)


def cancelled(inputs: Inputs, axis: int) -> tuple[str, ...]:
    """Of equal values the weights do not matter; of equal keys the query does not."""
    same = {name for name in ("k", "v") if bool((inputs[name].diff(dim=axis) == 0).all())}
    return ("q", "k") if "v" in same else ("q",) if same else ()


def _attention(name: str, *, keys: int, channels_last: bool) -> OpCase:
    """`keys` more keys than queries, and two at least: to one there is no gradient but that of its value."""

    def make(spec: Spec) -> Inputs:
        channels = spec.shape[1]
        of_keys = shaped(spec, channels, channels_last, max(2, pixels(spec) + keys))
        return {
            "q": replace(spec, shape=shaped(spec, channels, channels_last)).first(),
            "k": spec.operand("k", of_keys, 2),
            "v": spec.operand("v", of_keys, 3),
            "num_heads": heads_of(channels),
            "scale": SCALES.get(spec.values),
        }

    def formula(inputs: Inputs) -> Results:
        return (oracles.attention(*(inputs[k] for k in ("q", "k", "v", "num_heads", "scale")), channels_last),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (attention(channels_last=channels_last, **inputs),),
        formula=formula,
        differentiable=("q", "k", "v"),
        per_sample=("q", "k", "v"),
        native_dtypes=STORAGE,
        min_rank=2,
        of_shapes=SHAPES_OF_IMAGES,
        in_storage=True,
        cancels=lambda inputs: cancelled(inputs, 1 if channels_last else 2),
    )


def _attention_qkv(name: str, order: str, *, channels_last: bool) -> OpCase:
    def make(spec: Spec) -> Inputs:
        channels = spec.shape[1]
        packed = replace(spec, shape=shaped(spec, 3 * channels, channels_last))
        return {"qkv": packed.first(), "num_heads": heads_of(channels), "scale": SCALES.get(spec.values)}

    def formula(inputs: Inputs) -> Results:
        q, k, v = oracles.unpacked(inputs["qkv"], inputs["num_heads"], order, channels_last)
        return (oracles.attention(q, k, v, inputs["num_heads"], inputs["scale"], channels_last),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (attention_qkv(order=order, channels_last=channels_last, **inputs),),
        formula=formula,
        differentiable=("qkv",),
        per_sample=("qkv",),
        native_dtypes=STORAGE,
        min_rank=2,
        of_shapes=SHAPES_OF_IMAGES,
        in_storage=True,
    )


CASES = [
    _attention("attention", keys=0, channels_last=True),
    _attention("attention four more keys", keys=4, channels_last=False),
    _attention_qkv("attention hqkvc", "hqkvc", channels_last=False),
    _attention_qkv("attention qkvhc", "qkvhc", channels_last=True),
    _attention_qkv("attention hcqkv", "hcqkv", channels_last=False),
]
