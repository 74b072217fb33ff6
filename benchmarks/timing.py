"""Timing that a shared, noisy machine cannot bend: variants interleaved in one process, compared by their medians."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, cast

import torch

Variants = Mapping[str, Callable[[], Any]]

# torch.cuda._sleep counts clock cycles. A GPU clocked lower sleeps longer, which does no harm.
_CYCLES_PER_SECOND = 2.0e9
_LONGEST_SLEEP = 20e-3
# What rotating sets of inputs hold together: this, and this many times the second-level cache.
_LEAST_ROTATING_BYTES = 240_000_000
_CACHES = 4


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
    to launch the call, so that gaps between launches are not counted: `interleave` counts those. What the call reads is
    cold then, but what it writes may stay in the cache: `interleave_turns` is for figures near a copy's bandwidth.
    Where one call moves several times what the cache holds, either is right.
    """
    cache = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    return _in_turn(variants, rounds, warmup, _queued(variants, before=cache.zero_))


class Rotation:
    """One variant on several sets of inputs, a call for each set; calling it makes every call once, in order.

    A call's result is kept until the same call has made its next one, so that results take turns in memory as the
    inputs do: with `sets_needed` sets nothing that a call reads or writes is still in the cache, whoever ran before it.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = list(calls)
        self._results: list[Any] = [None] * len(self.calls)

    def __call__(self) -> None:
        for place, call in enumerate(self.calls):
            self._results[place] = call()


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of that size make a rotation: 240 MB and four times the cache together, but two."""
    return max(2, -(-max(_LEAST_ROTATING_BYTES, _CACHES * cache_bytes) // set_bytes))


def interleave_turns(
    variants: Mapping[str, Rotation], *, rounds: int = 30, warmup: int = 3, device: str = "cpu"
) -> dict[str, Timing]:
    """Time of a call where each variant, once a round, goes through all its sets of inputs.

    On a GPU between two CUDA events around the turn, all launches queued before, so that what the host does in between
    is not counted; on a CPU by the wall clock.
    """
    measure = _queued(variants) if device == "cuda" else _wall_clock
    return _in_turn(variants, rounds, warmup, lambda turn: measure(turn) / len(cast(Rotation, turn).calls))


def interleave_graphs(
    variants: Variants, *, calls: int = 50, rounds: int = 30, warmup: int = 3, device: str = "cpu"
) -> dict[str, Timing]:
    """Time of a call in a CUDA graph that holds `calls` of them, one behind the other, between two CUDA events.

    What is small enough for this to matter stays in the cache, as it does between two layers of a network. On a CPU the
    wall-clock time of as many calls.
    """
    if device == "cpu":
        return interleave(variants, calls=calls, rounds=rounds, warmup=warmup)
    graphs = {name: _captured(function, calls) for name, function in variants.items()}
    replays = {name: graph.replay for name, graph in graphs.items()}
    measure = _queued(replays)
    return _in_turn(replays, rounds, warmup, lambda replay: measure(replay) / calls)


def _captured(function: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is compiled or allocated at a first call cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def _wall_clock(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _queued(
    functions: Mapping[str, Callable[[], Any]], before: Callable[[], Any] | None = None
) -> Callable[[Callable[[], Any]], float]:
    """A stopwatch for these: seconds between two CUDA events, while the GPU slept until all was launched."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch = {function: _launch_time(function) for function in functions.values()}

    def measure(function: Callable[[], Any]) -> float:
        if before is not None:
            before()
        torch.cuda._sleep(int(min(2 * launch[function], _LONGEST_SLEEP) * _CYCLES_PER_SECOND))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    return measure


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
