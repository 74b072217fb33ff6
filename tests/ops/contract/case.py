"""What the tests of the contract must know of an op: how to make arguments, how to call it, and what is right.

Each op has a file beside this one with a list of `OpCase`, one a form, and a line in __init__.py. A new backend is one
more name in ../cases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import DTYPES, in_layout, randn
from tests.ops.guarded import Guarded

Inputs = dict[str, Any]  # the arguments by name
Results = tuple[Tensor, ...]

# What the first operand holds. "nan" and "inf" are in one sample, the middle one.
VALUES = ("randn", "mean 1e3", "constant", "nan", "inf", "-inf", "subnormal", "near 6e4")

# One value; primes; HW = 1; one sample; an empty axis; ranks 1 to 5; a batch over 256; more than a kernel's block.
SHAPES = [
    (1,),
    (7,),
    (3, 6),
    (1, 1, 1, 1),
    (2, 7, 13),
    (3, 12, 7, 5),
    (2, 6, 1, 1),
    (2, 13, 11, 17),
    (2, 6, 3, 5, 7),
    (257, 4, 2, 3),
    (1, 96, 9, 11),
    (1, 3, 70, 67),
    (0, 4, 4, 4),
    (2, 4, 0, 3),
]


@dataclass(frozen=True)
class Spec:
    """What the arguments of one call are like. `layout` is that of the first operand, `other` that of the rest."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    other: str = "contiguous"
    values: str = "randn"
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # by name, where it is not x's

    def first(self) -> Tensor:
        values = _filled(self.values, randn(*self.shape, seed=1, dtype=torch.float64))
        return in_layout(values.to(self.dtype), self.layout)

    def operand(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        return in_layout(randn(*shape, seed=seed, dtype=self.dtypes.get(name, self.dtype)), self.other)


def _filled(values: str, x: Tensor) -> Tensor:
    if values in ("nan", "inf", "-inf"):
        sample = x[x.shape[0] // 2 : x.shape[0] // 2 + 1].view(-1)
        sample[-1:] = float(values)
        return x
    return {
        "randn": x,
        "mean 1e3": x + 1e3,
        "constant": torch.full_like(x, 0.1),
        "subnormal": x * 3e-40,
        "near 6e4": (x * 3e3 + 6e4).clamp(max=65504),
    }[values]


@dataclass(frozen=True)
class OpCase:
    """One form of one op.

    make(spec) -> the arguments, tensors among them.
    call(inputs, memory) -> its results, each (N, …). Where the caller allocates a result he takes guarded `memory`, if
        any is given; the tensors among the arguments stay as they are.
    formula(inputs) -> the same in plain torch, in the dtype of the inputs: in float64 the oracle, in float32 what a
        user of eager PyTorch would have written.
    differentiable: arguments to which gradients flow; per_sample: those of them whose gradient is per sample.
    differentiable_results: how many results, the first ones, pass a gradient on.
    reduced_results: how many results, the first ones, are one number a sample in the arithmetic's dtype.
    buffers: arguments that a call writes (it is given copies), handed back as the last results, one for each entry of
        their first axis. for_formula: values that the formula alone is given.
    allowed(dtype) -> the dtypes other than x's that an argument may have.
    """

    name: str
    make: Callable[[Spec], Inputs]
    call: Callable[[Inputs, Guarded | None], Results]
    formula: Callable[[Inputs], Results]
    differentiable: tuple[str, ...] = ()
    per_sample: tuple[str, ...] = ()
    differentiable_results: int = 1
    reduced_results: int = 0
    buffers: tuple[str, ...] = ()
    for_formula: tuple[str, ...] = ()
    allowed: Callable[[torch.dtype], Mapping[str, tuple[torch.dtype, ...]]] = lambda dtype: {}
    min_rank: int = 1
    native_dtypes: tuple[torch.dtype, ...] = DTYPES
    cancels: Callable[[Inputs], tuple[str, ...]] = lambda inputs: ()  # whose gradients are 0 but for rounding
    hides: bool = False  # whether a sample's statistics may hide where in it a NaN or Inf was
    of_shapes: tuple[tuple[int, ...], ...] = ()  # in place of SHAPES
    in_storage: bool = False  # whether 16-bit arithmetic is held to what eager PyTorch makes of it in 16 bits

    def shapes(self) -> list[tuple[int, ...]]:
        return list(self.of_shapes) or [shape for shape in SHAPES if len(shape) >= self.min_rank]

    def runs_on(self, backend: str, dtype: torch.dtype) -> bool:
        if backend == "triton":
            return dtype != torch.float64
        return backend != "native" or dtype in self.native_dtypes


def first_operand(inputs: Inputs) -> Tensor | None:
    """What dtype and memory format follow; None for an op whose first argument is no tensor."""
    first = next(iter(inputs.values()))
    return first if isinstance(first, Tensor) else None


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values as fresh leaves in another floating dtype."""
    return {
        name: value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
