"""Timing that a shared, noisy machine cannot bend: variants interleaved in one process, compared by their medians."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

Variants = Mapping[str, Callable[[], Any]]

# torch.cuda._sleep counts clock cycles. A GPU clocked lower sleeps longer, which does no harm.
_CYCLES_PER_SECOND = 2.0e9
_LONGEST_SLEEP = 20e-3


@dataclass(frozen=True)
class Timing:
    """Seconds a call: 20th, 50th and 80th percentile, and every round's in the order they ran."""

    p20: float
    p50: float
    p80: float
    rounds: tuple[float, ...]


def interleave(
    variants: Variants, *, rounds: int = 30, calls: int = 1, warmup: int = 3, device: str = "cpu"
) -> dict[str, Timing]:
    """Wall-clock time: each variant once a round, `calls` calls at a time, in turning order; `warmup` rounds are extra.

    On a GPU the clock stops when the last call's work is done.
    """

    def measure(function: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    return _in_turn(variants, rounds, warmup, measure)


def interleave_on_gpu(variants: Variants, *, rounds: int = 30, warmup: int = 3) -> dict[str, Timing]:
    """Time between two CUDA events around one call, with a cold second-level cache and all launches queued before.

    A buffer twice as large as the cache is written before each call. Then the GPU sleeps for as long as the host takes
    to launch the call, so that gaps between launches are not counted: `interleave` counts those.
    """
    cache = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch = {name: _launch_time(function) for name, function in variants.items()}

    def measure(function: Callable[[], Any], name: str) -> float:
        cache.zero_()
        torch.cuda._sleep(int(min(2 * launch[name], _LONGEST_SLEEP) * _CYCLES_PER_SECOND))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    timed = {name: (lambda f=function, n=name: measure(f, n)) for name, function in variants.items()}
    return _in_turn(timed, rounds, warmup, lambda measured: measured())


def _launch_time(function: Callable[[], Any]) -> float:
    """How long the host is busy with one call, after a first one has loaded what it needs."""
    function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return seconds


def _in_turn(
    variants: Variants, rounds: int, warmup: int, measure: Callable[[Callable[[], Any]], float]
) -> dict[str, Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            order = order[1:] + order[:1]
            for name in order:
                elapsed = measure(variants[name])
                if index >= warmup:
                    seconds[name].append(elapsed)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(*percentiles(values), tuple(values)) for name, values in seconds.items()}


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]
