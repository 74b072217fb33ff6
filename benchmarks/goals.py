"""What a row is to reach and what it aims at, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """measure: "share" of a copy's bandwidth, "us" (microseconds a call), or "ratio" (baseline's time over ours)."""

    measure: str
    reach: float
    aim: float

    def met(self, value: float) -> str:
        """ "aim", "reach" or "no"."""
        for name, bound in (("aim", self.aim), ("reach", self.reach)):
            if value <= bound if self.measure == "us" else value >= bound:
                return name
        return "no"

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a row of the measurement says about the goal."""
        goal = {"measure": self.measure, "reach": self.reach, "aim": self.aim}
        return goal if "skipped" in row else goal | {"met": self.met(value_of(row | goal))}


def value_of(row: dict[str, Any]) -> float:
    """The figure that the row's goal is about."""
    if row["measure"] == "us":
        return row["diffkern_us"][1]
    return row["share_of_copy" if row["measure"] == "share" else "ratio"]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table with a line for each case that has a goal: what was measured, reached, and the ratios.

    Empty without such cases. A case whose rows were all left out says why.
    """
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "reach" in row:
            cases.setdefault((row["op"], row["case"]), []).append(row)
    if not cases:
        return ""
    lines = [
        "| kernel | case | share of copy, µs or ratio | reach | aim | reached? | baselines' time over diffkern's |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    return "\n".join([*lines, *(_line(*name, found) for name, found in cases.items())])


def _line(op: str, case: str, rows: list[dict[str, Any]]) -> str:
    first = next((row for row in rows if "skipped" not in row), rows[0])
    bounds = " | ".join(_text(first["measure"], first[name]) for name in ("reach", "aim"))
    ratios = "; ".join(f"{row['baseline']} {_ratio(row)}" for row in rows)
    if "skipped" in first:
        return f"| {op} | {case} | — | {bounds} | not measured | {_cell(ratios)} |"
    value = _text(first["measure"], value_of(first))
    reached = {"aim": "yes, and the aim", "reach": "yes", "no": "no"}[first["met"]]
    return f"| {op} | {case} | {value} | {bounds} | {reached} | {_cell(ratios)} |"


def _ratio(row: dict[str, Any]) -> str:
    return f"skipped: {row['skipped']}" if "skipped" in row else f"{row['ratio']:.2f}"


def _text(measure: str, value: float) -> str:
    return {"share": f"{value:.1%}", "us": f"{value:.2f} µs", "ratio": f"{value:.2f}"}[measure]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
