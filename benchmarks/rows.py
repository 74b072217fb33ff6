"""The rows of a benchmark run, and the JSON file that holds them.

A row is a dict: what was measured (op, case, baseline, device, backend), the times of both sides in microseconds as
[p20, p50, p80], their ratio (baseline's time over diffkern's, of the medians) with the 20th and 80th percentile of the
rounds' own ratios, the bytes that must be moved, and what it was measured with. A row that could not be measured has
`skipped`, the reason, in place of times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, device_name
from benchmarks.timing import Timing, percentiles
from diffkern import __version__
from diffkern.ops import _registry

Row = dict[str, Any]
Key = tuple[str, str, str, str]
_REQUIRED = {"op", "case", "baseline"}
_MEASURED = {"ratio", "baseline_us", "diffkern_us"}


def subject(op: str, case: str, baseline: str, device: str, *, headline: bool) -> Row:
    """What a row is about and was made with; README shows those that are `headline`."""
    return {
        "op": op,
        "case": case,
        "baseline": baseline,
        "device": device,
        "headline": headline,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffkern": __version__,
        "commit": commit(),
        "machine": device_name(device),
    }


def figures(baseline: Timing, ours: Timing, bytes_moved: int | None, copy_bandwidth: float) -> Row:
    """What two timings say; `bytes_moved` is the least that must be read and written, None where nobody can say."""
    quotients = [theirs / mine for theirs, mine in zip(baseline.rounds, ours.rounds, strict=True)]
    low, _, high = percentiles(quotients)
    row = {
        "ratio": baseline.p50 / ours.p50,
        "ratio_p20_p80": [low, high],
        "baseline_us": _microseconds(baseline),
        "diffkern_us": _microseconds(ours),
    }
    if bytes_moved is None:
        return row
    rate = bytes_moved / ours.p50
    return row | {
        "bytes": bytes_moved,
        "gb_per_s": rate / 1e9,
        "copy_gb_per_s": copy_bandwidth / 1e9,
        "share_of_copy": rate / copy_bandwidth,
    }


def _microseconds(timing: Timing) -> list[float]:
    return [1e6 * value for value in (timing.p20, timing.p50, timing.p80)]


def backend_of(op: str, call: Callable[[], Any]) -> str:
    """`diffkern.backends.explain` for the first call of `op` inside `call`: which backend, and why not another."""
    return _registry.explain_within(op, call).removeprefix(f"{op}: ")


def measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "skipped" not in row]


def key(row: Row) -> Key:
    """What two rows of different runs must share to be compared."""
    return row["op"], row["case"], row["baseline"], row.get("device", "cpu")


def save(path: Path, machine: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **more, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """A saved run, with `machine` and `rows`.

    Raises FileNotFoundError, or ValueError if the file is not a benchmark result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result["rows"]
        missing = [name for row in rows for name in sorted(_required(row) - row.keys())]
        if missing or not isinstance(result["machine"], dict):
            raise ValueError(f"a row has no {missing[0]!r}" if missing else "'machine' is not an object")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a result of `diffkern bench`: {what}") from None
    return result


def _required(row: Row) -> set[str]:
    return _REQUIRED if "skipped" in row else _REQUIRED | _MEASURED
