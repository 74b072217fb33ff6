"""What multistep solvers share: orders row by row, and the slots in which the rows before left their predictions.

Row i writes to slot i mod S of a ring of S slots, so the j-th row before it left its own in slot (i − j) mod S.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from diffkern.solvers.transitions import Transitions


def step_lengths(steps: Transitions) -> np.ndarray:
    """h = λ' − λ (R,), infinite where a step comes from α = 0 or leads to σ = 0."""
    return steps.log_snr_next - steps.log_snr


def before(values: np.ndarray, back: int) -> np.ndarray:
    """values[i − back] for every row i (R,); NaN for the rows that have none."""
    shifted = np.full(values.shape, np.nan)
    shifted[back:] = values[: max(len(values) - back, 0)]
    return shifted


def usable_orders(orders: ArrayLike, h: np.ndarray, most: int | None = None) -> np.ndarray:
    """int64 (R,): `orders`, an int or ints (R,) from 1 to `most`, lowered where a row cannot have so high a one.

    A row of order p looks back on p − 1 steps. They and its own must be there, finite and not of length 0, for the
    differences between predictions are divided by them.

    Raises ValueError for orders that are not of that shape or out of range.
    """
    wanted = np.asarray(orders)
    range_ = "1 or more" if most is None else f"from 1 to {most}"
    if wanted.dtype.kind not in "iu" or wanted.shape not in ((), h.shape):
        raise ValueError(f"orders are {orders!r}; they must be an int or ints of shape {h.shape}, {range_}")
    if (wanted < 1).any() or (most is not None and (wanted > most).any()):
        raise ValueError(f"orders are {orders!r}; they must be {range_}")
    usable = np.isfinite(h) & (h != 0)
    run = np.empty(len(h), dtype=np.int64)  # how many steps in a row, up to this one, are usable
    length = 0
    for row, good in enumerate(usable):
        length = length + 1 if good else 0
        run[row] = max(length, 1)
    return np.minimum(wanted, run)


def ring_reads(of_m: Mapping[int, np.ndarray], size: int, first: int = 0, name: str = "c") -> dict[str, np.ndarray]:
    """The columns by which a row reads what those before it left; of_m[j] (R,) is the coefficient of the j-th before.

    The ring's slots are first, …, first + size − 1. Raises ValueError if a row looks back on more than `size`.
    """
    rows = np.arange(len(next(iter(of_m.values()), ())))
    named = {f"{name}_h{first + k}": np.zeros(len(rows)) for k in range(size)}
    for back, column in of_m.items():
        if back > size and column.any():
            raise ValueError(f"history is {size}; rows look back on {back} before them")
        for k in range(size):
            here = (rows - back) % size == k
            named[f"{name}_h{first + k}"][here] += column[here]
    return named


def ring_writes(read: Mapping[int, np.ndarray], size: int, first: int = 0, every_row: bool = False) -> np.ndarray:
    """int64 (R,), the slot of the ring that each row writes; −1 where no row reads it and not `every_row` is to write.

    read[j] (R,) says, by not being 0, which rows read what the j-th before them left.
    """
    rows = np.arange(len(next(iter(read.values()), ())))
    wanted = np.full(len(rows), every_row)
    for back, column in read.items():
        wanted[: max(len(rows) - back, 0)] |= column[back:] != 0
    return np.where(wanted, first + rows % max(size, 1), -1)
