"""Few combinations out of many: every two values of two different axes meet, or at least every value is there."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any


def pairwise(axes: Sequence[Sequence[Any]], seed: int = 0) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis; the same rows for the same axes and seed.

    Greedy: each row starts from a pair that has not met yet, and takes on every other axis the value that meets the
    most values of the row for the first time (among equals, one at random).
    """
    rng = random.Random(seed)
    pairs = (
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a in range(len(axes[i]))
        for b in range(len(axes[j]))
    )
    missing = dict.fromkeys(pairs)
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        rest = [i for i in range(len(axes)) if i not in row]
        rng.shuffle(rest)
        for i in rest:
            values = list(range(len(axes[i])))
            rng.shuffle(values)
            row[i] = max(values, key=lambda v, i=i: sum(_pair((i, v), other) in missing for other in row.items()))
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(axes[i][row[i]] for i in range(len(axes))))
    return rows


def each_value(axes: Sequence[Sequence[Any]], seed: int = 0) -> list[tuple[Any, ...]]:
    """As few rows as the longest axis is long; every value is in one, and which meet is the seed's choice."""
    rng = random.Random(seed)
    columns = []
    for axis in axes:
        shuffled = rng.sample(list(axis), len(axis))
        columns.append([shuffled[i % len(axis)] for i in range(max(map(len, axes)))])
    return list(zip(*columns, strict=True))


def _pair(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (a, b) if a < b else (b, a)
