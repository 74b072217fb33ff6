"""What the native backends share: dtype codes, operands with addresses, thread counts."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops import _memory

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PARALLEL_FROM = 32768  # elements; below, waking a second thread costs more than it saves

OperandTuple = tuple[int, int, int]
ParameterTuple = tuple[int, int, int, int]


def cpu_only(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the native kernels are for CPU tensors, this one is on {x.device}"
    # Freed storage, and what functionalisation wraps: torch has its own answer to each.
    return None if x.data_ptr() or not x.numel() else "the tensor has no memory of its own"


def operand(x: Tensor) -> OperandTuple:
    """(address, dtype code, elements between samples) of a tensor from `sample_dense`, which must outlive the call."""
    address = x.data_ptr()
    if address == 0 and x.numel():
        raise RuntimeError(f"a tensor of shape {tuple(x.shape)} has no memory: its storage was freed")
    return address, DTYPE_CODES[x.dtype], x.stride(0)


def optional_operand(x: Tensor | None) -> OperandTuple | None:
    """`operand`, and None for an operand that a call does without."""
    return None if x is None else operand(x)


def parameter_tuple(p: Tensor | None) -> ParameterTuple | None:
    """The bindings' `param`: (C,) has no stride between samples, (N, C) has both, whatever they are."""
    if p is None:
        return None
    if p.dim() == 1:
        return p.data_ptr(), DTYPE_CODES[p.dtype], 0, p.stride(0)
    return p.data_ptr(), DTYPE_CODES[p.dtype], p.stride(0), p.stride(1)


def gradient_room(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Room for a parameter's gradient in float32, contiguous; empty and of x's dtype where there is none."""
    if parameter is None:
        return x.new_empty(0)
    return torch.empty(parameter.shape, dtype=torch.float32)


def counter_source(seed: Tensor, draw: Tensor, samples: Tensor, stream: int) -> tuple[int, int, bool, int, bool, int]:
    """The bindings' `source`; the tensors are contiguous and must outlive the call."""
    return seed.data_ptr(), draw.data_ptr(), draw.dim() > 0, samples.data_ptr(), samples.dim() > 0, stream


def output_like(x: Tensor) -> Tensor:
    """An output that a kernel is about to write whole, in x's memory format."""
    return about_to_write(_memory.output_like(x))


def about_to_write(out: Tensor) -> Tensor:
    """`out` itself, with huge pages asked for where it is large and fresh memory (csrc/cpu/huge_pages.h)."""
    native_module().advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def num_threads(numel: int) -> int:
    return torch.get_num_threads() if numel >= PARALLEL_FROM else 1
