"""Flow matching: x_s = (1−s)·x0 + s·ε, from data at s = 0 to noise at s = 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from diffkern.process.gaussian import ProcessTables
from diffkern.process.spacing import Steps, check_rising, pick_timesteps

if TYPE_CHECKING:
    import torch

FLOW_PREDICTIONS = ("flow", "x0", "eps", "v")


class FlowProcess:
    """The straight path between data and noise (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2022, 2209.03003).

    t in [0, T) is 0-based and stands at u = (t+1)/T, shifted to s = shift·u/(1 + (shift − 1)·u) (Esser et al. 2024,
    arXiv 2403.03206, eq. 23; 1 leaves u as it is, more spends more steps on noise): t = T−1 is noise alone.
    `prediction` is what the network's output means: "flow" = ε − x0, the velocity dx/ds, or "x0", "eps", or "v" as
    `solvers.chain` has it.

    The attributes are read-only float64 arrays (T,): `sigmas`, s itself, and `timestep_map`, what the network is
    given, T·s (diffusers' convention: 1000·s for T = 1000).

    A sampler runs it with any solver of the ODE: DDIM with η = 0 is Euler's x' = x + (s' − s)·flow.

    Raises ValueError for T below 1, a shift that is not positive, and another prediction.
    """

    channel_variance = "fixed"

    def __init__(self, num_timesteps: int = 1000, *, shift: float = 1.0, prediction: str = "flow") -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")
        if not 0 < shift < np.inf:
            raise ValueError(f"shift is {shift}; it must be positive and finite")
        if prediction not in FLOW_PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}; it may be one of {', '.join(map(repr, FLOW_PREDICTIONS))}")
        self.shift = shift
        self.prediction = prediction
        u = np.arange(1, num_timesteps + 1) / num_timesteps
        sigmas = shift * u / (1.0 + (shift - 1.0) * u)
        self._set_levels(sigmas, num_timesteps * sigmas)

    def _set_levels(self, sigmas: np.ndarray, timestep_map: np.ndarray) -> None:
        self.num_timesteps = len(sigmas)
        self.sigmas, self.timestep_map = sigmas, timestep_map
        for table in (self.sigmas, self.timestep_map):
            table.setflags(write=False)

    def spaced(self, steps: Steps | None, spacing: str = "respaced", steps_offset: int = 0) -> list[int]:
        """The timesteps in [0, T) that `steps` picks, rising: all for None, else those of `space_timesteps`."""
        return pick_timesteps(self.num_timesteps, steps, spacing, steps_offset)

    def respace(self, steps: Steps | None) -> FlowProcess:
        """The process of fewer steps: an int S (evenly spaced), section counts, "ddimN", or None for all of them."""
        return self.keep(self.spaced(steps))

    def keep(self, timesteps: ArrayLike) -> FlowProcess:
        """The process of the given steps alone, rising in [0, T); `sigmas` and `timestep_map` are theirs."""
        kept = check_rising(timesteps, self.num_timesteps)
        shorter = FlowProcess(shift=self.shift, prediction=self.prediction)
        shorter._set_levels(self.sigmas[kept], self.timestep_map[kept])
        return shorter

    def tables(self, device: torch.device | str | None = None) -> ProcessTables:
        """(1−s, s), what x0 and ε are multiplied with, in the place of (√ᾱ, √(1−ᾱ)): float64 (T,) on `device`."""
        import torch

        return ProcessTables(
            torch.tensor(1.0 - self.sigmas, device=device), torch.tensor(self.sigmas, device=device)
        )
