"""Rows as text: the table of a run, and a run beside an earlier one."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import goals
from benchmarks.rows import Row, key, measured

# One row in fourteen of the same code, run twice on a shared machine (benchmarks/results), differs by more than this.
SLOWER = 1.25


def tables(rows: Sequence[Row]) -> str:
    """`table`, and before it, where rows have goals, what came of these."""
    return "\n\n".join(filter(None, [goals.table(rows), table(rows)]))


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of all rows; one that could not be measured says why."""
    lines = [
        "| op | case | against | backend | baseline µs | diffkern µs (p20–p80) | ratio | GB/s | of copy |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    what = f"| {row['op']} | {row['case']} | {row['baseline']} |"
    if "skipped" in row:
        return f"{what} — | skipped: {_cell(row['skipped'])} | — | — | — | — |"
    low, middle, high = row["diffkern_us"]
    backend = row.get("backend", "—").partition(";")[0]
    rate = f"{row['gb_per_s']:.1f} | {row['share_of_copy']:.0%}" if "gb_per_s" in row else "— | —"
    return (
        f"{what} {backend} | {row['baseline_us'][1]:.0f} | {middle:.0f} ({low:.0f}–{high:.0f}) "
        f"| {row['ratio']:.2f} | {rate} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def comparison(then: Sequence[Row], now: Sequence[Row]) -> str:
    """diffkern's own times of two runs, row by row: then over now, so that above 1 it has become faster.

    A row is flagged if now it takes more than `SLOWER` times as long. Rows of one run alone are named below.
    """
    earlier = {key(row): row for row in measured(then)}
    later = {key(row): row for row in measured(now)}
    lines = ["| op | case | against | then µs | now µs | then/now | |", "|---|---|---|--:|--:|--:|---|"]
    slower = 0
    for name, row in later.items():
        if name not in earlier:
            continue
        before, after = earlier[name]["diffkern_us"][1], row["diffkern_us"][1]
        flag = f"slower than {SLOWER:.2f} times" if after > SLOWER * before else ""
        slower += bool(flag)
        lines.append(f"| {' | '.join(name[:3])} | {before:.0f} | {after:.0f} | {before / after:.2f} | {flag} |")
    shared = len(earlier.keys() & later.keys())
    lines += ["", f"{slower} of {shared} rows take more than {SLOWER:.2f} times as long as then"]
    lines += [f"only now: {', '.join(name[:3])}" for name in later if name not in earlier]
    lines += [f"only then: {', '.join(name[:3])}" for name in earlier if name not in later]
    return "\n".join(lines)
