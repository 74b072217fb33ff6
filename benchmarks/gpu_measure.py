"""A case of `benchmarks/gpu_kernels.py`, checked and timed beside its baselines and a copy: a row for each baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import rows
from benchmarks.baselines import Unavailable, compiled
from benchmarks.compare import assert_close
from benchmarks.gpu_kernels import TOLERANCE, Case, Inputs
from benchmarks.timing import Rotation, Timing, interleave_graphs, interleave_turns, sets_needed

COMPILED = "torch.compile, max-autotune"
_MODE = "max-autotune-no-cudagraphs"
_COPY_BYTES = 2**29
_CHECKED_SAMPLES = 2
_IN_TURNS = "CUDA events around a turn through inputs larger than the second-level cache, copies in the same round"
_IN_A_GRAPH = "CUDA events around a graph of many calls"


class Copy:
    """Copies of `size` bytes from tensor to tensor, two in turn: what a share of a copy's bandwidth is a share of."""

    def __init__(self, device: str, size: int = _COPY_BYTES) -> None:
        pairs = [[torch.randn(size // 4, device=device) for _ in range(2)] for _ in range(2)]
        self.turn = Rotation([lambda s=source, t=target: t.copy_(s) for source, target in pairs])
        self.bytes_moved = 2 * 4 * (size // 4)


def eager_name(memory_format: str) -> str:
    return f"eager, {memory_format}"


def measure(
    case: Case, *, device: str, copy: Copy, rounds: int, cache_bytes: int, memory: float = float("inf")
) -> list[rows.Row]:
    """Every variant on the same number of sets, enough for none to be found in a cache of `cache_bytes`.

    memory: bytes that may be taken. A baseline that is `Unavailable`, and a case that needs more memory than there is,
    have rows with the reason. Raises AssertionError if diffkern's result for the first samples is not the float64
    reference's.
    """
    baselines = [eager_name(memory_format) for memory_format in case.formats] + [COMPILED] * case.compiles
    about = {name: rows.subject(case.op, case.name, name, device, headline=False) for name in baselines}
    sets = 1 if case.in_graph else sets_needed(_bytes(case.inputs("meta", case.formats[0])), cache_bytes)
    needed = memory_needed(case, sets)
    if needed > memory:
        reason = f"needs up to {needed / 1e9:.0f} GB of the GPU's memory, of which {memory / 1e9:.0f} GB are free"
        return [_with_goal(case, row | {"skipped": reason}) for row in about.values()]

    inputs = {
        memory_format: [case.inputs(device, memory_format) for _ in range(sets)] for memory_format in case.formats
    }
    own = inputs[case.formats[0]]
    check(case, own[0])
    sides: dict[str, tuple[Callable[..., Any], list[Inputs]]] = {"diffkern": (case.fused, own)}
    for memory_format in case.formats:
        sides[eager_name(memory_format)] = (case.composition(), inputs[memory_format])
    if case.compiles:
        sides[COMPILED] = (case.composition(lambda function: compiled(function, _MODE)), own)
    turns, missing = {}, {}
    for name, (function, given) in sides.items():
        try:
            turns[name] = Rotation([case.prepared(function, one) for one in given])
            turns[name]()
        except Unavailable as reason:
            turns.pop(name, None)
            missing[name] = {"skipped": str(reason)}
    backend = rows.backend_of(case.explained, lambda: case.prepared(case.fused, own[0])())
    if case.in_graph:
        times = interleave_graphs(turns, rounds=rounds, device=device)
        method, bandwidth = _IN_A_GRAPH, None
    else:
        times = interleave_turns({**turns, "copy": copy.turn}, rounds=rounds, device=device)
        method, bandwidth = _IN_TURNS, copy.bytes_moved / times["copy"].p50
    if device == "cpu":
        method = "wall clock"
    found = {"backend": backend, "method": method, "sets": sets}
    return [
        _with_goal(case, row | (missing[name] if name in missing else found | _figures(case, times, name, bandwidth)))
        for name, row in about.items()
    ]


def check(case: Case, inputs: Inputs) -> None:
    """Raises AssertionError unless diffkern's result for the first samples is the float64 reference's."""
    samples = min(_CHECKED_SAMPLES, case.shape[0])
    expected = case.expected(inputs, samples)
    kept = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    result = case.per_sample(case.prepared(case.fused, kept)())
    assert len(result) == len(expected)
    for part, exact in zip(result, expected, strict=True):
        assert part.shape[0] == case.shape[0]
        assert_close(exact, TOLERANCE[case.dtype])(part[:samples])


def memory_needed(case: Case, sets: int) -> int:
    """A generous estimate: inputs in every format, and what each side keeps and writes for each set."""
    one = _bytes(case.inputs("meta", case.formats[0]))
    written = (case.passes + 1) * case.x_bytes
    return (sets + 1) * (len(case.formats) * one + (len(case.formats) + 2) * written)


def _figures(case: Case, times: dict[str, Timing], baseline: str, bandwidth: float | None) -> rows.Row:
    moved = case.bytes_moved if bandwidth else None
    return rows.figures(times[baseline], times["diffkern"], moved, bandwidth or 0.0)


def _with_goal(case: Case, row: rows.Row) -> rows.Row:
    return row | case.goal.fields(row)


def _bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values())
