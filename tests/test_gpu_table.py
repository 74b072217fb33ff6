"""The table of GPU kernels: its cases in small sizes on a CPU, how its inputs rotate, and what its lines say."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, goals, gpu_kernels, gpu_measure, rows
from benchmarks.goals import Goal
from benchmarks.timing import Rotation, Timing, interleave_graphs, interleave_turns, sets_needed
from diffkern import backends
from diffkern.backends import use_backend
from diffkern.ops import philox_normal

CASES = list(gpu_kernels.cases())
EAGER_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-5}  # eager rounds to bfloat16 after every operation


def small(case, **changes):
    """The case on tensors for which a CPU takes no time; the names of all cases stay different."""
    shape = (4, 3, 8, 8) if case.shape[1] == 3 else (min(case.shape[0], 3), 64, 4, 4)
    return dataclasses.replace(case, shape=shape, **changes)


def by_name(case):
    return f"{case.op}, {case.name}"


def parts(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_both_sides_of_a_case_agree(case, backend, monkeypatch):
    """With the same noise: eager's draws are replaced by, and the stored ε is, the counter's normals."""
    case = small(case)
    monkeypatch.setattr(torch, "randn_like", lambda x: normals(case, x))
    torch.manual_seed(0)
    for memory_format in case.formats:
        inputs = case.inputs("cpu", memory_format)
        if "noise" in inputs:
            inputs["noise"] = philox_normal(case.shape, 1, stream=3, dtype=case.dtype)
        own = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()}
        eager = parts(case.prepared(case.composition(), inputs)())
        if backend is None:
            gpu_measure.check(case, own)
            ours = parts(case.prepared(case.fused, own)())
        else:
            with use_backend(backend):
                ours = parts(case.prepared(case.fused, own)())
        assert len(ours) == len(eager)
        for mine, theirs in zip(ours, eager, strict=True):
            assert mine.shape == theirs.shape
            if backend is None and "previous" in inputs:
                break  # `check` and the call after it have both stepped from the remembered x0
            error = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()
            assert error <= EAGER_TOLERANCE[case.dtype]
        assert eager[0].stride() == ours[0].stride()


def normals(case: gpu_kernels.Case, x: Tensor) -> Tensor:
    solver = isinstance(case, gpu_kernels.Step)
    counter = {"draw": case.row, "stream": 2} if solver else {"stream": 3}
    return philox_normal(x.shape, 1, **counter, dtype=x.dtype)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_wrong_result_is_not_timed(case):
    """It is off by a fiftieth in the second sample."""
    case = small(case)
    if case.shape[0] == 1:
        case = dataclasses.replace(case, shape=(2, *case.shape[1:]))
    inputs = case.inputs("cpu", case.formats[0])
    right = type(case).fused

    class Wrong(type(case)):
        def fused(self, *leaves, **given):
            result = right(self, *leaves, **given)
            if backends.forced_backend() == "reference":
                return result
            first = parts(result)[0].clone()
            first[1].mul_(1.02)
            return (first, *result[1:]) if isinstance(result, tuple) else first

    wrong = Wrong(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)})
    with pytest.raises(AssertionError, match="error"):
        gpu_measure.check(wrong, inputs)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_the_bytes_counted_are_those_of_what_must_be_read_and_written(case):
    """Every tensor of the case's size that the op takes and gives, except an ε of its own; parameters are left out."""
    inputs = case.inputs("meta", case.formats[0])
    given = [name for name, value in inputs.items() if value.shape == case.shape and name != "noise"]
    written = 2 if "previous" in inputs else 1
    assert case.bytes_moved == (len(given) + written) * math.prod(case.shape) * case.dtype.itemsize
    assert {value.device.type for value in inputs.values()} == {"meta"}


def test_the_table_has_what_it_is_to_have():
    assert len({(case.op, case.name) for case in CASES}) == len(CASES)
    found = {(type(case).__name__, getattr(case, "solver", None), case.dtype): case.goal for case in CASES}
    full, half = torch.float32, torch.bfloat16
    assert found["Noising", None, full] == Goal("share", 0.90, 0.95)
    assert found["Noising", None, half] == Goal("share", 0.65, 0.80)
    assert found["Step", "ddpm", full] == Goal("share", 0.90, 0.96)
    assert found["Step", "ddpm", half] == Goal("share", 0.80, 0.90)
    for solver in ("ddim", "dpmpp_2m"):
        assert found["Step", solver, full] == found["Step", solver, half] == Goal("share", 0.92, 0.97)
    assert found["Loss", None, full] == found["Loss", None, half] == Goal("share", 0.80, 0.90)
    assert found["RatioToEager", None, half] == Goal("ratio", 3.2, 4.1)
    for case in CASES:
        if isinstance(case, gpu_kernels.Attention):
            short = math.prod(case.shape[2:]) <= 256
            assert case.goal == (Goal("ratio", 1.3, 1.6) if short else Goal("ratio", 0.95, 1.05))
            assert case.formats == (("contiguous",) if short else ("channels_last",))
        if case.shape == gpu_kernels.IMAGES:
            assert case.bytes_moved > 240e6
        assert case.in_graph == (case.goal.measure == "us")
        if case.in_graph:
            assert case.bytes_moved <= 2**20


def test_a_turn_makes_every_call_once_and_keeps_its_result_until_the_next():
    made = []

    def call(number):
        made.append(number)
        return torch.full((1000,), float(number))

    turn = Rotation([lambda n=n: call(n) for n in range(3)])
    turn()
    held = {result.data_ptr() for result in turn._results}
    assert len(held) == 3
    turn()
    assert made == [0, 1, 2, 0, 1, 2]
    assert [float(result[0]) for result in turn._results] == [0, 1, 2]


def test_every_variant_sees_every_buffer_in_every_round_and_a_call_is_what_is_timed(monkeypatch):
    seen = []
    turns = {
        name: Rotation([lambda name=name, n=n: seen.append((name, n)) for n in range(size)])
        for name, size in (("a", 4), ("b", 2))
    }
    clock = iter(range(1000))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: float(next(clock)))
    times = interleave_turns(turns, rounds=3, warmup=1)
    a, b = [("a", n) for n in range(4)], [("b", n) for n in range(2)]
    assert seen == (b + a + a + b) * 2
    assert times["a"].rounds == (0.25,) * 3  # one second a turn by this clock
    assert times["b"].rounds == (0.5,) * 3


def test_sets_hold_four_caches_and_240_mb_together():
    assert sets_needed(10_000_000, 50_000_000) == 24
    assert sets_needed(10_000_000, 100_000_000) == 40
    assert sets_needed(10_000_001, 100_000_000) == 40
    assert sets_needed(9_999_999, 100_000_000) == 41
    assert sets_needed(500_000_000, 50_000_000) == 2


def test_small_calls_are_made_many_times_without_a_gpu_too():
    made = []
    interleave_graphs({"a": lambda: made.append(1)}, calls=7, rounds=2, warmup=1)
    assert len(made) == 7 * 3


@pytest.mark.parametrize(
    ("measure", "value", "met"),
    [("share", 0.80, "reach"), ("share", 0.7999, "no"), ("share", 0.95, "aim"), ("us", 4.0, "no"), ("us", 0.9, "reach"),
     ("us", 0.8, "aim")],
)  # fmt: skip
def test_what_a_goal_is_met_by(measure, value, met):
    goal = Goal(measure, 0.80, 0.95) if measure == "share" else Goal(measure, 0.90, 0.80)
    assert goal.met(value) == met


@pytest.fixture
def measured(monkeypatch):
    """The rows of some small cases, on a CPU."""
    monkeypatch.setattr(gpu_measure, "sets_needed", lambda *_: 3)
    copy = gpu_measure.Copy("cpu", 2**14)

    def run(*cases, **options):
        return [
            row
            for case in cases
            for row in gpu_measure.measure(case, device="cpu", copy=copy, rounds=2, cache_bytes=0, **options)
        ]

    return run


def test_rows_of_every_case(measured):
    for case in CASES:
        case = small(case, compiles=False)
        found = measured(case)
        assert [row["baseline"] for row in found] == [f"eager, {name}" for name in case.formats]
        for row in found:
            assert (row["reach"], row["aim"]) == (case.goal.reach, case.goal.aim)
            assert row["met"] == case.goal.met(goals.value_of(row))
            assert row["ratio"] == pytest.approx(row["baseline_us"][1] / row["diffkern_us"][1])
            assert row["backend"].startswith("native")
            if not case.in_graph:
                assert row["bytes"] == case.bytes_moved
                assert row["sets"] == 3
                share = case.bytes_moved / (1e-6 * row["diffkern_us"][1]) / (1e9 * row["copy_gb_per_s"])
                assert row["share_of_copy"] == pytest.approx(share)


def test_a_baseline_that_is_missing_and_a_gpu_that_is_too_small_leave_rows_with_the_reason(measured, monkeypatch):
    def missing(**_):
        raise baselines.Unavailable("no compiler")

    monkeypatch.setattr(gpu_measure, "compiled", lambda function, mode: missing)
    case = small(CASES[0])
    *eager, compiled = measured(case)
    assert compiled["skipped"] == "no compiler"
    assert (compiled["reach"], "met" in compiled) == (0.9, False)
    assert all("skipped" not in row for row in eager)

    needed = gpu_measure.memory_needed(case, 3)
    assert all("skipped" not in row for row in measured(small(case, compiles=False), memory=needed))
    short = measured(case, memory=needed - 1)
    assert len(short) == 3
    assert all("of the GPU's memory" in row["skipped"] for row in short)
    line = goals.table(short).splitlines()[-1]
    assert "| — | 90.0% | 95.0% | not measured |" in line


def row(baseline, theirs, ours, goal, case="256×256", **more):
    times = [Timing(t, t, t, (t,)) for t in (theirs, ours)]
    found = rows.subject("group_norm", case, baseline, "cpu", headline=False) | rows.figures(*times, 8_000, 1e9) | more
    return found | goal.fields(found)


def test_the_tables_lines():
    share, micro = Goal("share", 0.80, 0.92), Goal("us", 4.0, 2.5)
    skipped = rows.subject("group_norm", "256×256", "torch.compile", "cpu", headline=False) | {"skipped": "a | b"}
    text = goals.table(
        [
            row("eager", 30e-6, 9.6e-6, share),
            skipped | share.fields(skipped),
            rows.subject("q_sample", "4×4", "eager", "cpu", headline=False) | {"skipped": "no goal"},
            row("eager", 30e-6, 3e-6, micro, "small"),
            row("eager", 30e-6, 5e-6, micro, "small too"),
        ]
    )
    header, rule, large, few, too_long = text.splitlines()
    assert header == (
        "| kernel | case | share of copy, µs or ratio | reach | aim | reached? | baselines' time over diffkern's |"
    )
    assert rule.count("|") == header.count("|")
    assert large == (
        "| group_norm | 256×256 | 83.3% | 80.0% | 92.0% | yes | eager 3.12; torch.compile skipped: a \\| b |"
    )
    assert few == "| group_norm | small | 3.00 µs | 4.00 µs | 2.50 µs | yes | eager 10.00 |"
    assert too_long == "| group_norm | small too | 5.00 µs | 4.00 µs | 2.50 µs | no | eager 6.00 |"
    assert goals.table([]) == ""
