"""The levels of noise that a run visits: some of the process's own timesteps, or σ̂ = σ/α spaced by a formula."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from diffkern.process import FlowProcess, GaussianProcess, space_sigmas, timesteps_of_sigmas
from diffkern.process.spacing import Steps, whole
from diffkern.solvers.transitions import Process, Transitions, chain, transitions


def grid(
    process: Process,
    steps: Steps | None,
    *,
    spacing: str = "respaced",
    steps_offset: int = 0,
    sigmas: str | None = None,
    start: int | None = None,
) -> GaussianProcess | Transitions:
    """What a solver is built from: `process` in `steps` of its timesteps, or Transitions: with `sigmas`, and
    of a FlowProcess.

    - Without `sigmas` the timesteps are those of `process.space_timesteps(T, steps, spacing, steps_offset)`, all for
      None.
    - `sigmas` names a spacing of `process.space_sigmas`: that many levels (None: T) from the process's largest σ̂ to its
      least, then 0. The state keeps the variance, α = 1/√(1+σ̂²), and the network is given fractional timesteps, at
      which the process has the same σ̂.
    - `start`: the run begins at this timestep of `process` and goes on with those of its levels that lie below.

    Raises ValueError naming the argument that cannot be, and for `sigmas` of a process whose σ̂ is infinite at the end,
    or that is no GaussianProcess.
    """
    if sigmas is None:
        timesteps = process.spaced(steps, spacing, steps_offset)
        kept = timesteps if start is None else [*(t for t in timesteps if t < start), start]
        return transitions(process.keep(kept)) if isinstance(process, FlowProcess) else process.keep(kept)
    if isinstance(process, FlowProcess):
        raise ValueError(f"sigmas is {sigmas!r}; a FlowProcess takes None: its own levels may be shifted")
    if spacing != "respaced" or steps_offset:
        raise ValueError(f"spacing is {spacing!r}, steps_offset {steps_offset}; with sigmas there is no choice of them")
    if isinstance(steps, Iterable):
        raise ValueError(f"steps is {steps!r}; with sigmas it must be an int, or None")
    if process.alphas_cumprod[-1] == 0:
        raise ValueError(
            f"sigmas is {sigmas!r}, but alphas_cumprod ends at 0, where σ/α is infinite; "
            "use sigmas=None with a spacing, or a schedule that ends above 0"
        )
    count = process.num_timesteps if steps is None else whole(steps)
    if not 1 <= count <= process.num_timesteps:
        raise ValueError(f"steps is {count}; it must be in [1, {process.num_timesteps}], the steps of the process")
    table = np.sqrt((1.0 - process.alphas_cumprod) / process.alphas_cumprod)
    levels = space_sigmas(sigmas, count, table[0], table[-1])
    if start is not None:
        # The formulas meet the table's own level to rounding.
        levels = np.append(table[start], levels[levels < table[start] * (1.0 - 1e-9)])
    positions = timesteps_of_sigmas(levels, table)
    times = np.interp(positions, np.arange(process.num_timesteps), process.timestep_map)
    levels = np.append(levels, 0.0)
    alpha = 1.0 / np.sqrt(1.0 + levels**2)
    return chain(alpha, levels * alpha, times, process.prediction)
