"""Which timesteps of a long process a shorter one keeps, and the β of the shorter one."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np


def space_timesteps(num_timesteps: int, section_counts: int | str | Iterable[int]) -> list[int]:
    """Timesteps in [0, num_timesteps) to keep, rising.

    `section_counts` is, as in OpenAI's code,
    - a list of counts, or a string "10,15,20": [0, T) is cut into that many sections of nearly equal length (the first
      ones are longer by one where T does not divide), and that many steps are taken from each, evenly, both ends of
      the section included;
    - an int S, which means [S];
    - "ddimN": N steps at one fixed integer stride from 0, as in the DDIM paper (arXiv 2010.02502, D.3).

    Raises ValueError where a section is shorter than its count, where no integer stride gives exactly N steps, and
    for a description that cannot be read.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")
    if isinstance(section_counts, str):
        if stride_count := re.fullmatch(r"ddim(\d+)", section_counts.strip()):
            return _strided(num_timesteps, int(stride_count[1]))
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", section_counts):
            raise ValueError(f"section_counts is {section_counts!r}; it may be 'ddimN' or counts such as '10,15,20'")
        counts = [int(count) for count in section_counts.split(",")]
    elif isinstance(section_counts, Iterable):
        counts = [int(count) for count in section_counts]
    else:
        counts = [int(section_counts)]
    if sum(counts) < 1 or min(counts) < 0:
        raise ValueError(f"section_counts are {counts}; they must be at least 0, and one of them more")

    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise ValueError(
                f"section_counts asks for {count} steps of section {section}, which has {size} of "
                f"the {num_timesteps} timesteps"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # OpenAI's code adds the stride up, then rounds half to even: a running sum, not a product, has its ties.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))[:count]
        kept += [start + round(offset) for offset in offsets.tolist()]
        start += size
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
    raise ValueError(f"section_counts 'ddim{count}': no integer stride takes {count} of {num_timesteps} timesteps")
