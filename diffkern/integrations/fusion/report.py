"""What `fuse` did and did not do, and why."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 2  # names of each kind in the table


@dataclass(frozen=True)
class Replaced:
    """A block that runs on the ops now.

    name: as in ``model.named_modules()``. block: its class. effect: what is done in one pass, or what an option did.
    difference: max|after − before| / max|before| on a random input with random parameters.
    """

    name: str
    block: str
    effect: str
    difference: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """A block, or a part of one, that is left alone: its name, its class and the reason."""

    name: str
    block: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` replaced and what it left alone. Printed, it is a table (with rich, where that is installed)."""

    replaced: tuple[Replaced, ...] = field(default=())
    skipped: tuple[Skipped, ...] = field(default=())

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{len(self.replaced)} replaced, {len(self.skipped)} left", title_justify="left")
        for heading, justify in (("", "left"), ("block", "left"), ("what, or why not", "left"), ("where", "left")):
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in self._rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            rows = "\n".join("  ".join(row) for row in self._rows())
            return f"{len(self.replaced)} replaced, {len(self.skipped)} left\n{rows}"
        written = io.StringIO()
        Console(file=written, width=120).print(self)
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines()).rstrip()

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """One row for all modules of which the same is to be said."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for done in self.replaced:
            groups.setdefault(("replaced", done.block, done.effect), []).append(done.name)
        for left in self.skipped:
            groups.setdefault(("left", left.block, left.reason), []).append(left.name)
        for (what, block, why), names in groups.items():
            shown = ", ".join(name or "the model" for name in names[:_SHOWN])
            more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
            yield f"{what} {len(names)}×", block, why, shown + more
