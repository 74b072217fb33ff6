"""README's table of measured figures, from saved runs: `python -m benchmarks.readme RUN.json [RUN.json ...]`.

It replaces what stands between the lines `<!-- bench -->` and `<!-- /bench -->` of README.md. Times are the median over
the runs, ratios the lowest and the highest of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import rows
from benchmarks.machine import ROOT

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def table(runs: Sequence[Sequence[rows.Row]]) -> str:
    """The headline rows that every run has measured, in the first run's order."""
    by_key = [{rows.key(row): row for row in rows.measured(run) if row.get("headline", True)} for run in runs]
    lines = ["| op | case | against | baseline | diffkern | ratio |", "|---|---|---|--:|--:|--:|"]
    for name, first in by_key[0].items():
        found = [run[name] for run in by_key if name in run]
        if len(found) == len(runs):
            times = (_time(median(row[side][1] for row in found)) for side in ("baseline_us", "diffkern_us"))
            ratio = _ratio([row["ratio"] for row in found])
            lines.append(
                f"| `{first['op']}` | {_squares(first['case'])} | {first['baseline']} | {' | '.join(times)} | {ratio} |"
            )
    return "\n".join(lines)


def insert(text: str, table: str) -> str:
    """`text` with `table` between the markers; raises ValueError if they do not stand there once, in this order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"README.md must have the lines {BEGIN} and {END} once each, in this order")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def _time(microseconds: float) -> str:
    """Three digits, in µs below 100 of them, else in ms or s: "0.58 ms", "14.2 ms"."""
    value, unit = microseconds, "µs"
    if microseconds >= 100:
        value, unit = microseconds / 1e3, "ms"
    if microseconds >= 1e6:
        value, unit = microseconds / 1e6, "s"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def _ratio(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low}–{high}"


def _squares(case: str) -> str:
    """ "8×128×32×32" as "8×128×32²"."""
    return re.sub(r"×(\d+)×\1(?!\d)", r"×\1²", case)


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    text = table([rows.load(Path(name))["rows"] for name in arguments])
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
