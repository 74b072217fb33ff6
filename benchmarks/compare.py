"""One row: correctness first, then diffkern and a baseline interleaved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.baselines import Unavailable
from benchmarks.timing import Timing, interleave, interleave_on_gpu

Call = Callable[[], Any]
Check = Callable[[Any], None]


def measure(
    op: str,
    case: str,
    baseline: str,
    ours: Call,
    eager: Call,
    *,
    bytes_moved: int | None = None,
    check: Check,
    device: str,
    copy_bandwidth: float,
    rounds: int,
    check_baseline: Check | None = None,
    within: str | None = None,
    wall_clock: bool = False,
    headline: bool = False,
) -> rows.Row:
    """A row of `ours` against `eager`, which is the baseline of that name.

    bytes_moved: the least that must be read and written; None where nobody can say. check, check_baseline: given each
    side's result before anything is timed, they raise if it is wrong. within: the op whose backend the row names, if
    `op` is not one itself. On a GPU the work there is timed, with a cold cache, and the wall-clock time of many calls
    stands beside it; with wall_clock that is the time.

    A side that is `Unavailable`, or a call that makes no tensors on the device asked for, gives a row with the reason.
    """
    row = rows.subject(op, case, baseline, device, headline=headline)
    try:
        result = ours()
        expected = eager()
    except Unavailable as reason:
        return row | {"skipped": str(reason)}
    found = _device_of(result)
    if found not in (None, device):
        return row | {"skipped": f"this benchmark makes its tensors on {found}"}
    check(result)
    if check_baseline is not None:
        check_baseline(expected)
    del result, expected
    row["backend"] = rows.backend_of(within or op, ours)

    variants = {"baseline": eager, "diffkern": ours}
    wall = interleave(variants, rounds=rounds, calls=calls_for(ours, device), device=device)
    if device == "cpu" or wall_clock:
        row["method"] = "wall clock"
        return row | _figures(wall, bytes_moved, copy_bandwidth)
    row["method"] = "CUDA events, cold second-level cache"
    row["wall_us"] = {name: 1e6 * timing.p50 for name, timing in wall.items()}
    return row | _figures(interleave_on_gpu(variants, rounds=rounds), bytes_moved, copy_bandwidth)


def _figures(times: dict[str, Timing], bytes_moved: int | None, copy_bandwidth: float) -> rows.Row:
    return rows.figures(times["baseline"], times["diffkern"], bytes_moved, copy_bandwidth)


def _device_of(result: Any) -> str | None:
    values = result if isinstance(result, tuple | list) else [result]
    return next((value.device.type for value in values if isinstance(value, Tensor)), None)


def calls_for(function: Call, device: str, target: float = 2e-3) -> int:
    """How many calls make about two milliseconds."""
    once = {"one": function}
    seconds = interleave(once, rounds=1, warmup=0, device=device)["one"].p50
    if seconds < target:
        seconds = interleave(once, rounds=5, device=device)["one"].p50
    return max(1, min(200, int(target / seconds)))


def measure_copy_bandwidth(device: str) -> float:
    """Bytes a second that copying memory already in use reads and writes: 256 MiB on a CPU, 1 GiB on a GPU.

    Rows above 100 % of it stay in a cache; large outputs that are fresh memory also pay for its first touch, as eager's
    do.
    """
    source = torch.randn(64 * 2**20 if device == "cpu" else 256 * 2**20, device=device)
    target = torch.zeros_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    times = interleave(copy, rounds=10) if device == "cpu" else interleave_on_gpu(copy, rounds=10)
    return 2 * source.nbytes / times["copy"].p50


def assert_close(expected: Tensor, tolerance: float = 2e-6) -> Check:
    """A check that a result lies within `tolerance` of `expected`, relative to its largest value."""

    def check(result: Tensor) -> None:
        error = (result.to(expected.device).double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"error {error:.2e} above {tolerance:.0e}"

    return check
