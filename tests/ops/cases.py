"""Tensors in every layout, and what "right" means: the error against float64, and beside eager PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")
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
    """max |actual − exact| / max |exact| over finite values; infinite where only one is NaN or infinite."""
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} is not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    if not bool((same | (actual - exact).isfinite()).all()):
        return float("inf")
    difference = (actual - exact)[~same].abs()
    largest = exact[exact.isfinite()].abs()
    if not difference.numel():
        return 0.0
    return float(difference.max() / (largest.max() if largest.numel() else difference.new_ones(())).clamp_min(2.0**-40))


def assert_as_good_as_eager(actual: Tensor, exact: Tensor, eager: Tensor, case: object) -> None:
    """At most twice the error of the composition that a user of PyTorch would have written, in the same dtype."""
    ours, theirs = error(actual, exact), error(eager, exact)
    bound = 2 * theirs + FLOOR[actual.dtype]
    assert ours <= bound, f"{case}: error {ours:.3g}, eager {theirs:.3g}, allowed {bound:.3g}"


def assert_rounded_once(actual: Tensor, exact: Tensor, eager: Tensor, arithmetic: torch.dtype, case: object) -> None:
    """Computed in the dtype `arithmetic` and rounded to actual's at the end.

    Every element lies within one rounding of the exact value and twice the error that `eager`, plain PyTorch in
    float32, makes of the whole (or a few roundings, FLOOR); for float64 arithmetic that error is scaled down by the two
    formats' precisions. So 16-bit results are held to float32 arithmetic. Infinities and NaN are where the rounded
    exact values have them; integers are equal.
    """
    assert actual.shape == exact.shape, f"{case}: {tuple(actual.shape)} is not {tuple(exact.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, exact), f"{case}: integers differ"
        return
    dtype = actual.dtype
    limits, rounded = torch.finfo(dtype), exact.to(dtype)
    assert torch.equal(actual.isnan(), rounded.isnan()), f"{case}: NaN where there is none, or none where there is"
    infinite = actual.isinf() | rounded.isinf()
    ends = [t[infinite].clamp(limits.min, limits.max) for t in (actual, rounded)]
    assert torch.equal(*ends), f"{case}: infinity where there is none, or none where there is"
    finite = ~(infinite | actual.isnan())
    actual, exact, eager = (t[finite].double() for t in (actual, exact, eager))
    if not actual.numel():
        return
    scale = torch.finfo(arithmetic).eps / torch.finfo(torch.float32).eps
    theirs = scale * (eager - exact).nan_to_num(0.0, 0.0, 0.0).abs().max()
    subnormal = max(torch.finfo(d).smallest_normal * torch.finfo(d).eps for d in (dtype, arithmetic))
    allowed = exact.abs() * limits.eps / 2 + 2 * theirs + FLOOR[arithmetic] * exact.abs().max() + subnormal
    excess = (actual - exact).abs() - allowed
    worst = int(excess.argmax())
    assert float(excess[worst]) <= 0, (
        f"{case}: {float(actual[worst])} instead of {float(exact[worst])}, off by more than {float(allowed[worst]):.3g}"
    )


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
