"""Tensors in every layout, and what "right" means: the error against float64, and beside eager PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*STORAGE, torch.float64)

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "broadcast", "offset", "channels_last_offset")

# Relative to the largest value; below it nobody asks whose rounding was luckier.
FLOOR = {torch.float32: 8 * 2.0**-24, torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15, torch.float64: 2.0**-50}


def in_layout(values: Tensor, layout: str) -> Tensor:
    """`values` (N, …) lying otherwise in memory; "broadcast" repeats the first sample with a stride of 0.

    What surrounds a view is NaN, so that reading beside it shows.
    """
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return _moved(values).contiguous().movedim(-1, 1 if values.dim() > 1 else -1)
    if layout == "sliced":
        around = values.new_full([2 * size + 3 for size in values.shape], torch.nan)
        view = around[tuple(slice(1, 2 * size + 1, 2) for size in values.shape)]
        return view.copy_(values)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "broadcast":
        return values[:1].clone().expand(values.shape) if values.shape[0] else values.clone()
    if layout == "offset":
        return _offset(values)
    assert layout == "channels_last_offset"
    return _offset(_moved(values)).movedim(-1, 1 if values.dim() > 1 else -1)


def _moved(values: Tensor) -> Tensor:
    return values.movedim(1, -1) if values.dim() > 1 else values


def _offset(values: Tensor) -> Tensor:
    """Contiguous, one element behind an aligned address."""
    around = values.new_full([values.numel() + 2], torch.nan)
    return around[1:-1].copy_(values.reshape(-1)).view(values.shape)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact| / max |exact|; infinite where one is NaN and the other is not."""
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} is not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    if not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf")
    difference = (actual - exact).nan_to_num(0.0).abs().max()
    return float(difference / exact.nan_to_num(0.0).abs().max().clamp_min(2.0**-40))


def assert_as_good_as_eager(actual: Tensor, exact: Tensor, eager: Tensor, case: object) -> None:
    """At most twice the error of the composition that a user of PyTorch would have written, in the same dtype."""
    ours, theirs = error(actual, exact), error(eager, exact)
    bound = 2 * theirs + FLOOR[actual.dtype]
    assert ours <= bound, f"{case}: error {ours:.3g}, eager {theirs:.3g}, allowed {bound:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def memory_format(x: Tensor) -> str:
    """What the result for x must lie like: channels last if x does and is not contiguous too, else contiguous."""
    channels_last = x.dim() >= 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return "channels_last" if channels_last else "contiguous"


class Untouched:
    """A context in which the given tensors must be only read: neither bits nor version counters may change."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = [t for t in tensors if t is not None]

    def __enter__(self) -> None:
        self.before = [(t.detach().clone(), t._version) for t in self.tensors]

    def __exit__(self, *raised: object) -> None:
        for number, (tensor, (bits, version)) in enumerate(zip(self.tensors, self.before, strict=True)):
            assert same_bits(tensor.detach(), bits), f"tensor {number} was written"
            assert tensor._version == version, f"tensor {number} was written in place"
