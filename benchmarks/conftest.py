"""The `compare` fixture: correctness first, then diffkern and its baseline interleaved; and the table at the end."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Timing, interleave
from diffkern import __version__, backends

_ROWS: list[dict[str, Any]] = []


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second that copying 256 MiB into memory already in use reads and writes, measured in this run.

    Rows above 100 % stay in a cache; large outputs that are fresh memory also pay for its first touch, as eager's do.
    """
    source = torch.randn(64 * 2**20)
    target = torch.zeros_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, rounds=10)["copy"].p50
    return 2 * source.nbytes / seconds


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, copy_bandwidth: float) -> Callable[..., None]:
    """compare(op, case, baseline, ours, eager, bytes_moved, check): see `_compare`."""

    def run(
        op: str,
        case: str,
        baseline: str,
        ours: Callable[[], Any],
        eager: Callable[[], Any],
        *,
        bytes_moved: int,
        check: Callable[[Any], None],
    ) -> None:
        """Times `ours` against `eager`; `bytes_moved` is the least that must be read and written."""
        check(ours())
        calls = _calls_for(ours)
        times = interleave({"eager": eager, "diffkern": ours}, rounds=25, calls=calls)
        info = describe(op, case, baseline, times["eager"], times["diffkern"], bytes_moved, copy_bandwidth)
        benchmark.extra_info.update(info)
        _ROWS.append(info)
        benchmark.pedantic(ours, rounds=10, iterations=calls, warmup_rounds=1)

    return run


def _calls_for(function: Callable[[], Any], target: float = 2e-3) -> int:
    """How many calls make about two milliseconds."""
    seconds = interleave({"one": function}, rounds=5)["one"].p50
    return max(1, min(200, int(target / seconds)))


def describe(
    op: str, case: str, baseline: str, eager: Timing, ours: Timing, bytes_moved: int, copy_bandwidth: float
) -> dict[str, Any]:
    rate = bytes_moved / ours.p50
    return {
        "op": op,
        "case": case,
        "baseline": baseline,
        "ratio": eager.p50 / ours.p50,
        "eager_us": [1e6 * value for value in (eager.p20, eager.p50, eager.p80)],
        "diffkern_us": [1e6 * value for value in (ours.p20, ours.p50, ours.p80)],
        "bytes": bytes_moved,
        "gb_per_s": rate / 1e9,
        "share_of_copy": rate / copy_bandwidth,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def assert_close(expected: Tensor, tolerance: float = 2e-6) -> Callable[[Any], None]:
    """A check that a result lies within `tolerance` of `expected`, relative to its largest value."""

    def check(result: Tensor) -> None:
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"error {error:.2e} above {tolerance:.0e}"

    return check


def machine() -> dict[str, Any]:
    """What a figure means nothing without."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "kernels": backends.explain("group_norm"),
        "instruction_set": getattr(backends.native_module(), "isa", None),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "diffkern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "make bench",
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| op | case | against | baseline µs | diffkern µs (p20–p80) | ratio | GB/s | of copy |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, middle, high = row["diffkern_us"]
        lines.append(
            f"| {row['op']} | {row['case']} | {row['baseline']} | {row['eager_us'][1]:.0f} "
            f"| {middle:.0f} ({low:.0f}–{high:.0f}) | {row['ratio']:.2f} | {row['gb_per_s']:.1f} "
            f"| {row['share_of_copy']:.0%} |"
        )
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _ROWS:
        text = table(_ROWS)
        terminalreporter.write_line("")
        terminalreporter.write_line(text)
        out = Path("out")
        out.mkdir(exist_ok=True)
        (out / "bench.md").write_text(text + "\n")
        (out / "bench-rows.json").write_text(json.dumps({"machine": machine(), "rows": _ROWS}, indent=1) + "\n")
