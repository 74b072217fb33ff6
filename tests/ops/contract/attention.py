"""attention and attention_qkv: both orders of the axes, all orders of packed channels, keys of another number."""

from __future__ import annotations

from diffkern.ops import attention, attention_qkv
from tests.ops import oracles
from tests.ops.cases import STORAGE
from tests.ops.contract.case import Inputs, OpCase, Results, Spec

# (B, T, C) or (B, C, T): one position, one channel a head, primes, a batch over 256, more than a block, an empty batch.
ROWS = ((1, 1, 6), (2, 7, 6), (3, 13, 78), (1, 70, 24), (2, 33, 240), (257, 3, 6), (1, 257, 12), (0, 4, 6))
PLANES = tuple((b, c, t) for b, t, c in ROWS)

TRACED_ROWS = ((6, 35, 24), (5, 143, 24))
TRACED_PLANES = ((6, 24, 35), (5, 24, 143))

# Of values far from 0 the scores lie further apart than any softmax can tell.
SCALES = {"mean 1e3": 1e-3, "near 6e4": 1e-9}


def _attention(name: str, heads: int, *, keys: int, channels_last: bool) -> OpCase:
    """`keys` more keys than queries."""

    def make(spec: Spec) -> Inputs:
        shape = list(spec.shape)
        shape[1 if channels_last else 2] += keys
        return {
            "q": spec.first(),
            "k": spec.operand("k", tuple(shape), 2),
            "v": spec.operand("v", tuple(shape), 3),
            "scale": SCALES.get(spec.values),
        }

    def formula(inputs: Inputs) -> Results:
        return (oracles.attention(inputs["q"], inputs["k"], inputs["v"], heads, inputs["scale"], channels_last),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (attention(num_heads=heads, channels_last=channels_last, **inputs),),
        formula=formula,
        differentiable=("q", "k", "v"),
        per_sample=("q", "k", "v"),
        native_dtypes=STORAGE,
        of_shapes=ROWS if channels_last else PLANES,
        traced_shapes=TRACED_ROWS if channels_last else TRACED_PLANES,
        in_storage=True,
        cancels=lambda inputs: inputs["k"].shape[1 if channels_last else 2] == 1,  # of one score the softmax is 1
    )


def _attention_qkv(name: str, heads: int, order: str, *, channels_last: bool) -> OpCase:
    def make(spec: Spec) -> Inputs:
        return {"qkv": spec.first(), "scale": SCALES.get(spec.values)}

    def formula(inputs: Inputs) -> Results:
        q, k, v = oracles.unpacked(inputs["qkv"], heads, order, channels_last)
        return (oracles.attention(q, k, v, heads, inputs["scale"], channels_last),)

    return OpCase(
        name,
        make=make,
        call=lambda inputs, memory: (
            attention_qkv(num_heads=heads, order=order, channels_last=channels_last, **inputs),
        ),
        formula=formula,
        differentiable=("qkv",),
        per_sample=("qkv",),
        native_dtypes=STORAGE,
        of_shapes=ROWS if channels_last else PLANES,
        traced_shapes=TRACED_ROWS if channels_last else TRACED_PLANES,
        in_storage=True,
    )


CASES = [
    _attention("attention", 3, keys=0, channels_last=True),
    _attention("attention four more keys", 2, keys=4, channels_last=False),
    _attention_qkv("attention hqkvc", 2, "hqkvc", channels_last=False),
    _attention_qkv("attention qkvhc", 1, "qkvhc", channels_last=True),
    _attention_qkv("attention hcqkv", 2, "hcqkv", channels_last=False),
]
