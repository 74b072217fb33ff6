"""The fixtures of the benchmarks, their options, and the table and JSON file at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_measure, rows
from benchmarks.compare import measure, measure_copy_bandwidth
from benchmarks.gpu_kernels import Case
from benchmarks.machine import machine
from benchmarks.report import tables

_ROWS: list[rows.Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diffkern", "diffkern's benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are (default: cpu)")
    group.addoption("--rounds", type=int, default=25, help="how often each side is timed (default: 25)")
    group.addoption("--out", type=Path, default=Path("out"), help="folder for bench.json and bench.md (default: out)")
    group.addoption("--command", default="make bench", help="the command that the result says it was made with")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no NVIDIA GPU here")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where a benchmark puts its tensors: "cpu" or "cuda"."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def copy_bandwidth(device: str) -> float:
    """Bytes a second, measured in this run; see `measure_copy_bandwidth`."""
    return measure_copy_bandwidth(device)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, device: str, copy_bandwidth: float) -> Callable[..., None]:
    """compare(op, case, baseline, ours, eager, bytes_moved=…, check=…): see `benchmarks.compare.measure`.

    Once a test. `rounds` may be given to lower the number of rounds of a slow one.
    """

    def run(
        op: str, case: str, baseline: str, ours: Callable[[], Any], eager: Callable[[], Any], **options: Any
    ) -> None:
        rounds = request.config.getoption("--rounds")
        if "rounds" in options:
            rounds = min(rounds, options.pop("rounds"))
        row = measure(
            op, case, baseline, ours, eager, device=device, copy_bandwidth=copy_bandwidth, rounds=rounds, **options
        )
        _ROWS.append(row)
        if "skipped" in row:
            pytest.skip(row["skipped"])
        benchmark.extra_info.update(row)
        # pytest-benchmark's own file wants times that it took itself.
        timed = ours if device == "cpu" else lambda: (ours(), torch.cuda.synchronize())
        benchmark.pedantic(timed, rounds=min(rounds, 10), iterations=1)

    return run


@pytest.fixture(scope="session")
def gpu_copy(device: str) -> gpu_measure.Copy:
    """What a kernel's share of a copy's bandwidth is measured beside."""
    if device == "cpu":
        pytest.skip("the table of GPU kernels is measured with --device cuda")
    return gpu_measure.Copy(device)


@pytest.fixture
def gpu_table(benchmark: Any, request: pytest.FixtureRequest, gpu_copy: gpu_measure.Copy) -> Callable[[Case], None]:
    """gpu_table(case): its rows, see `benchmarks.gpu_measure.measure`. Once a test; skipped on a CPU."""

    def run(case: Case) -> None:
        torch.cuda.empty_cache()
        found = gpu_measure.measure(
            case,
            device="cuda",
            copy=gpu_copy,
            rounds=request.config.getoption("--rounds"),
            cache_bytes=torch.cuda.get_device_properties().L2_cache_size,
            memory=torch.cuda.mem_get_info()[0],
        )
        _ROWS.extend(found)
        timed = rows.measured(found)
        if not timed:
            pytest.skip(found[0]["skipped"])
        benchmark.extra_info["rows"] = timed
        # pytest-benchmark's own file wants a time that it took itself: a copy's will do.
        benchmark.pedantic(lambda: (gpu_copy.turn(), torch.cuda.synchronize()), rounds=1, iterations=1)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    out, text = config.getoption("--out"), tables(_ROWS)
    terminalreporter.write_line("")
    terminalreporter.write_line(text)
    rows.save(out / "bench.json", machine(config.getoption("--device"), config.getoption("--command")), _ROWS)
    (out / "bench.md").write_text(text + "\n", encoding="utf-8")
