"""Which timesteps of a long process a shorter one keeps, and the β of the shorter one."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

SPACINGS = ("respaced", "leading", "trailing", "linspace")

Steps = int | str | Iterable[int]


def space_timesteps(num_timesteps: int, steps: Steps, *, spacing: str = "respaced", steps_offset: int = 0) -> list[int]:
    """Timesteps in [0, num_timesteps) to keep, rising.

    With T = num_timesteps and `spacing`
    - "respaced", `steps` is, as in OpenAI's code, a list of counts, or a string "10,15,20": [0, T) is cut into that
      many sections of nearly equal length (the first ones are longer by one where T does not divide), and that many
      steps are taken from each, evenly, both ends of the section included; an int S, which means [S]; or "ddimN": N
      steps at one fixed integer stride from 0, as in the DDIM paper (arXiv 2010.02502, D.3).

    With the others `steps` is an int S (Lin et al. 2023, arXiv 2305.08891, table 2; rounded half to even):
    - "leading": k·⌊T/S⌋ + steps_offset, k = 0 … S−1.
    - "trailing": T − k·T/S, rounded, − 1: T−1 is the last, as a schedule with zero terminal SNR needs it.
    - "linspace": k·(T−1)/(S−1), rounded; 0 alone for S = 1.

    The schedulers of diffusers that leave out the lowest of S+1 timesteps (DPM-Solver, UniPC) have S+1 of these, [1:].

    Raises ValueError for an unknown spacing; for steps that are fractional, below 1 or more than there are timesteps
    (in a section); for a description that cannot be read, or without an integer stride that gives exactly N steps; for
    a steps_offset that is negative, leads beyond T−1, or is given with another spacing than "leading".
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it may be one of {', '.join(map(repr, SPACINGS))}")
    if steps_offset and spacing != "leading":
        raise ValueError(
            f"steps_offset is {steps_offset}; only the spacing 'leading' takes one, and this is {spacing!r}"
        )
    if spacing == "respaced":
        return _respaced(num_timesteps, steps)
    if isinstance(steps, Iterable):
        raise ValueError(f"steps is {steps!r}; the spacing {spacing!r} takes an int")
    count = whole(steps)
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"steps is {count}; it must be in [1, {num_timesteps}], the timesteps that there are")
    if spacing == "leading":
        kept = np.arange(count) * (num_timesteps // count) + whole(steps_offset, "steps_offset")
        if steps_offset < 0 or kept[-1] >= num_timesteps:
            largest = num_timesteps - 1 - (count - 1) * (num_timesteps // count)
            raise ValueError(f"steps_offset is {steps_offset}; {count} steps of {num_timesteps} allow 0 to {largest}")
    elif spacing == "trailing":
        # As arange has them, whose rounding of the stride decides ties in diffusers as well.
        kept = np.round(np.arange(num_timesteps, 0, -num_timesteps / count)[:count])[::-1].astype(np.int64) - 1
    else:
        kept = np.round(np.linspace(0, num_timesteps - 1, count)).astype(np.int64)
    return [int(t) for t in kept]


def _respaced(num_timesteps: int, steps: Steps) -> list[int]:
    if isinstance(steps, str):
        if stride_count := re.fullmatch(r"ddim(\d+)", steps.strip()):
            return _strided(num_timesteps, int(stride_count[1]))
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", steps):
            raise ValueError(f"steps is {steps!r}; it may be 'ddimN', or counts such as '10,15,20'")
        counts = [int(count) for count in steps.split(",")]
    else:
        counts = [whole(count) for count in (steps if isinstance(steps, Iterable) else [steps])]
    if sum(counts) < 1 or min(counts) < 0:
        raise ValueError(f"steps are {counts}; they must be at least 0, and one of them more")

    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise ValueError(
                f"steps asks for {count} steps of section {section}, which has {size} of the {num_timesteps} timesteps"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # OpenAI's code adds the stride up, then rounds half to even: a running sum, not a product, has its ties.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))[:count]
        kept += [start + round(offset) for offset in offsets.tolist()]
        start += size
    return kept


def pick_timesteps(num_timesteps: int, steps: Steps | None, spacing: str, steps_offset: int) -> list[int]:
    """All timesteps for `steps` None, else those of :func:`space_timesteps`."""
    if steps is None:
        return list(range(num_timesteps))
    if isinstance(steps, int) and not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}; it must be in [1, {num_timesteps}], the steps of the process")
    return space_timesteps(num_timesteps, steps, spacing=spacing, steps_offset=steps_offset)


def check_rising(timesteps: ArrayLike, num_timesteps: int) -> np.ndarray:
    """`timesteps` as an array; ValueError unless they are integers that rise within [0, num_timesteps)."""
    kept = np.asarray(timesteps)
    if kept.ndim != 1 or kept.size == 0 or kept.dtype.kind not in "iu":
        raise ValueError(f"timesteps are {kept.dtype} of shape {kept.shape}; they must be integers, 1-D, not empty")
    if kept[0] < 0 or kept[-1] >= num_timesteps or (np.diff(kept) < 1).any():
        raise ValueError(f"timesteps must rise within [0, {num_timesteps}); they are {kept.tolist()}")
    return kept


def respaced_betas(betas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """β (S,) of the process that makes only the steps `timesteps` (S,), rising, of the process with `betas` (T,).

    1 − β'_k is the product of 1 − β over the steps from the one after timesteps[k−1] to timesteps[k], so that ᾱ is
    the same at the kept ones (Nichol & Dhariwal 2021, eq. 19). The quotient of two ᾱ that the paper prints is 0/0
    once ᾱ has underflowed; the product is not.
    """
    starts = np.concatenate(([0], timesteps[:-1] + 1))
    return 1.0 - np.multiply.reduceat(1.0 - betas[: timesteps[-1] + 1], starts)


def _strided(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"steps is 'ddim{count}': no integer stride takes {count} of {num_timesteps} timesteps")


def whole(value: object, name: str = "steps") -> int:
    """`value` as an int; ValueError naming it unless it is a whole number, of whatever integer type."""
    try:
        if isinstance(value, bool):  # an index of Python's, but no count
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
