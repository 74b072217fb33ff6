"""Timing that a shared, noisy machine cannot bend: variants interleaved in one process, compared by their medians."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds a call: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def interleave(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 30, calls: int = 1, warmup: int = 3
) -> dict[str, Timing]:
    """Times each variant once a round, `calls` calls at a time, in turning order; `warmup` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            order = order[1:] + order[:1]
            for name in order:
                function = variants[name]
                begin = time.perf_counter()
                for _ in range(calls):
                    function()
                elapsed = (time.perf_counter() - begin) / calls
                if index >= warmup:
                    seconds[name].append(elapsed)
    finally:
        if collecting:
            gc.enable()
    return {name: _percentiles(values) for name, values in seconds.items()}


def _percentiles(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    cuts = quantiles(values, n=10, method="inclusive")
    return Timing(cuts[1], cuts[4], cuts[7])
