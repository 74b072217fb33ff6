"""The two pictures of a run: how near each row comes to the copy bandwidth, and its ratio to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, measured

_SHARES = (1.0, 0.3, 0.1, 0.03)


def draw(out: Path, machine: dict[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Writes roofline.png and ratios.png into `out` and returns their paths; a picture without rows is left out.

    Raises ModuleNotFoundError without matplotlib.
    """
    found = measured(rows)
    pictures = {"roofline.png": (_roofline, [row for row in found if "bytes" in row]), "ratios.png": (_ratios, found)}
    written = []
    for name, (picture, shown) in pictures.items():
        if shown:
            picture(out / name, machine, shown)
            written.append(out / name)
    return written


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    return {op: f"C{index}" for index, op in enumerate(dict.fromkeys(row["op"] for row in rows))}


def _where(machine: dict[str, Any]) -> str:
    name = machine.get("gpu") or f"{machine.get('cpu', 'unknown CPU')}, {machine.get('threads', '?')} threads"
    return f"{name}, torch {machine.get('torch', '?')}"


def _roofline(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Time against the bytes that must be moved. All ops stream, so bandwidth alone is the roof: no flops are claimed.

    On the line "100 %" the bytes move as fast as the copy measured in the same run; below it they stay in a cache.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 6.4), layout="constrained")
    colours, copy = _colours(rows), rows[0]["copy_gb_per_s"]
    megabytes = [row["bytes"] / 1e6 for row in rows]
    ends = [min(megabytes) / 2, 2 * max(megabytes)]
    for share in _SHARES:
        times = [1e3 * size / (share * copy) for size in ends]  # MB over GB/s are milliseconds
        axis.plot(ends, times, color="0.35" if share == 1 else "0.8", linewidth=1.4 if share == 1 else 0.8, zorder=1)
        label = f"{share:.0%} of copying,\n{share * copy:.3g} GB/s"
        axis.annotate(label, (ends[1], times[1]), (6, 0), textcoords="offset points", va="center", fontsize=8)
    for row, size in zip(rows, megabytes, strict=True):
        ours, theirs = row["diffkern_us"][1], row["baseline_us"][1]
        axis.plot([size, size], [ours, theirs], color=colours[row["op"]], linewidth=0.8, alpha=0.4, zorder=2)
        axis.plot(size, theirs, "o", markerfacecolor="white", markeredgecolor=colours[row["op"]], markersize=5)
        axis.plot(size, ours, "o", color=colours[row["op"]], markersize=6, zorder=3)
    for op, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=op)
    axis.plot([], [], "o", markerfacecolor="white", markeredgecolor="0.3", label="its baseline")
    axis.set(xscale="log", yscale="log", xlim=ends, xlabel="least bytes to read and write (MB)",
             ylabel="time of a call (µs, median)")  # fmt: skip
    axis.set_title(
        f"Time against the bytes floor: filled diffkern, hollow its baseline\n{_where(machine)}", fontsize=11
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _ratios(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """The baseline's median time over diffkern's; the whiskers are the 20th and 80th percentile of the rounds."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.27 * len(rows)), layout="constrained")
    colours = _colours(rows)
    for place, row in enumerate(rows):
        ratio = row["ratio"]
        axis.barh(place, ratio - 1, left=1, color=colours[row["op"]], alpha=0.75, height=0.7)
        low, high = row.get("ratio_p20_p80", (ratio, ratio))
        axis.plot([low, high], [place, place], color="0.15", linewidth=1.2)
        axis.plot([low, high], [place, place], "|", color="0.15", markersize=6)
    axis.axvline(1, color="0.15", linewidth=1)
    axis.set_xscale("log")
    ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50]
    low, high = axis.get_xlim()
    axis.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    names = [f"{row['op']}: {row['case']}, against {row['baseline']}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("baseline's time / diffkern's (log scale; right of 1 diffkern is faster)")
    axis.set_title(f"Bar: ratio of the medians; whiskers: p20–p80 of the rounds. {_where(machine)}", fontsize=10,
                   loc="right")  # fmt: skip
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)
