"""What schedulers share that count their steps and keep noise levels σ̂ = σ/α beside the timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffkern.integrations.diffusers.scheduler import Scheduler, _version
from diffkern.ops import q_sample
from diffkern.process import space_sigmas

SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}


class SigmaScheduler(Scheduler):
    """A scheduler whose step i leads from the level sigmas[i] to sigmas[i+1]."""

    def _set_up(self, noise: str) -> None:
        super()._set_up(noise)
        self._spacing()
        self._levels = np.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    # The levels. Users read them and, at times, replace them.

    @property
    def sigmas(self) -> Tensor:
        """σ̂, float32 (steps + 1,), on the CPU. New ones replace those that all further steps are made of."""
        return self._sigmas

    @sigmas.setter
    def sigmas(self, table: Tensor | Sequence[float]) -> None:
        tensor = table if isinstance(table, Tensor) else torch.tensor(table, dtype=torch.float32)
        values = tensor.detach().cpu().double().numpy()
        if not np.array_equal(values, self._levels):  # not those that were read from here and moved to a device
            self._levels = values
            self._forget_programs()
        self._sigmas, self._sigmas_version = tensor, _version(tensor)

    def _use_sigmas(self, levels: np.ndarray) -> None:
        """As float32 has them, of which diffusers' steps are made; the flow's α = 1 − σ near 1 is all that rounding."""
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self._forget_programs()

    def _schedule(self, timesteps: np.ndarray, levels: np.ndarray, device: torch.device | str | None) -> None:
        """What every set_timesteps ends with: timesteps (steps,) and levels (steps + 1,), and a new run."""
        self._set_timesteps(timesteps, device)
        self._use_sigmas(levels)
        self._step_index = self._begin_index = None

    def _sigma_table(self) -> np.ndarray:
        """σ̂ of every timestep of the process, float64 (T,), rising; ∞ where ᾱ is 0. Reckoned in the dtype of ᾱ."""
        abar = torch.as_tensor(self._abar, dtype=self.alphas_cumprod.dtype)
        return (((1 - abar) / abar) ** 0.5).double().numpy()

    def _checked_levels(self) -> np.ndarray:
        """The levels, from which a program is to be made; ValueError unless they are finite and none is negative."""
        levels = self._levels
        bad = np.flatnonzero(~(np.isfinite(levels) & (levels >= 0)))
        if bad.size:
            raise ValueError(
                f"sigmas[{bad[0]}] is {levels[bad[0]]}; sigmas must be finite and none below 0: they are where all "
                "betas lie in [0, 1) and alphas_cumprod stays above 0"
            )
        return levels

    # Spacings.

    def _spacing(self) -> str | None:
        """diffkern's name of the spacing that the config asks for, if any; ValueError if it asks for several."""
        asked = [flag for flag in SPACINGS if getattr(self.config, flag, False)]
        if len(asked) > 1:
            raise ValueError(f"{', '.join(asked)} are all True; only one of them may be")
        return SPACINGS[asked[0]] if asked else None

    def _respaced(self, name: str, in_sigmas: ArrayLike, n: int, **options: float) -> np.ndarray:
        """n levels from the largest of in_sigmas, which fall, to the smallest, or from sigma_max to sigma_min."""
        known = np.asarray(in_sigmas, dtype=np.float64)
        low, high = getattr(self.config, "sigma_min", None), getattr(self.config, "sigma_max", None)
        return space_sigmas(name, n, known[-1] if low is None else low, known[0] if high is None else high, **options)

    def _convert_to_karras(self, in_sigmas: ArrayLike, num_inference_steps: int) -> np.ndarray:
        """σ^(1/7) evenly (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
        return self._respaced("karras", in_sigmas, num_inference_steps)

    def _convert_to_exponential(self, in_sigmas: ArrayLike, num_inference_steps: int) -> np.ndarray:
        """log σ evenly."""
        return self._respaced("exponential", in_sigmas, num_inference_steps)

    def _convert_to_beta(
        self, in_sigmas: ArrayLike, num_inference_steps: int, alpha: float = 0.6, beta: float = 0.6
    ) -> np.ndarray:
        """σ at the quantiles of a beta distribution (arXiv 2407.12173); needs SciPy."""
        return self._respaced("beta", in_sigmas, num_inference_steps, alpha=alpha, beta=beta)

    def _convert_to_lu(self, in_lambdas: ArrayLike, num_inference_steps: int) -> np.ndarray:
        """log σ evenly (Lu et al. 2022, arXiv 2211.01095), of and as logarithms."""
        return np.log(self._respaced("lu", np.exp(in_lambdas), num_inference_steps))

    def _sigma_to_t(self, sigma: ArrayLike, log_sigmas: ArrayLike) -> np.ndarray:
        """The fractional timesteps of levels, between neighbours of log_sigmas (T,), those of the process.

        These rise, but for the last that zero terminal SNR may leave below its neighbour.
        """
        known = np.asarray(log_sigmas)
        log_sigma = np.log(np.maximum(sigma, 1e-10))
        reached = log_sigma[..., None] >= known
        last = known.size - 1 - reached[..., ::-1].argmax(axis=-1)
        low = np.where(reached.any(axis=-1), np.minimum(last, known.size - 2), 0)
        # In log_sigmas' own precision, float32 as a rule: what comes out a whole number must do so here too.
        share = np.clip((known[low] - log_sigma) / (known[low] - known[low + 1]), 0, 1)
        return np.asarray((1 - share) * low + share * (low + 1))

    def _log_sigma_table(self) -> np.ndarray:
        """log σ̂ of every timestep of the process, in the dtype of ᾱ, in which diffusers looks levels up.

        A float64 table would find the level of the last timestep elsewhere where zero terminal SNR has several of it.
        """
        return np.log(torch.as_tensor(self._sigma_table(), dtype=self.alphas_cumprod.dtype).numpy())

    # Counting.

    @property
    def step_index(self) -> int | None:
        """How many steps of the schedule are behind; None before the first step of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run begins, if `set_begin_index` said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The next run begins at this step, whatever timestep it is given first."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The step of a timestep in `timesteps`, or in schedule_timesteps; of several the second, so that a run that
        begins at a timestep which Heun's method visits twice does not begin with the end of a step.

        Raises ValueError for a timestep that is not there.
        """
        given = schedule_timesteps is not None and schedule_timesteps is not self.timesteps
        schedule = schedule_timesteps.cpu().numpy() if given else self._host_timesteps()  # type: ignore[union-attr]
        value = float(self._value(timestep))
        found = np.flatnonzero(schedule == schedule.dtype.type(value))
        if not found.size:
            raise ValueError(f"timestep is {value}; it must be one of the schedule's: {schedule.tolist()}")
        return int(found[min(1, found.size - 1)])

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _index(self, timestep: float | Tensor) -> int:
        """The step to be made; only the first of a run asks for the timestep's value."""
        if self._sigmas_version != _version(self._sigmas):
            self.sigmas = self._sigmas  # somebody wrote to it
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        if not self._step_index < len(self._levels) - 1:
            raise ValueError(f"all {len(self._levels) - 1} steps were made; call set_timesteps before another run")
        return self._step_index

    # Noise for image-to-image, inpainting and training.

    def _level_pair(self) -> tuple[np.ndarray, np.ndarray]:
        """α and σ of each of `sigmas`, float64, as this scheduler scales its state."""
        return np.ones_like(self._levels), self._levels

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The state at each of `timesteps`, (N,) or one for all, of the schedule; of both tensors' shape and dtype.

        Where `set_begin_index` was called, it is the state at that step, or at the current one, and `timesteps` do
        not matter. Tables in float64, arithmetic in float32. Raises ValueError for a timestep off the schedule.
        """
        if self._begin_index is None:
            indices = self._indices(timesteps)
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index]
        return self._at_levels(original_samples, noise, indices, *self._level_pair())

    def _indices(self, timesteps: Tensor) -> list[int]:
        """The step of each of `timesteps`."""
        position = self._position(timesteps)
        values = timesteps.flatten().tolist() if position is None else [self._host_timesteps()[position]]
        return [self.index_for_timestep(value) for value in values]

    def _at_levels(
        self, first: Tensor, second: Tensor, indices: list[int], of_first: np.ndarray, of_second: np.ndarray
    ) -> Tensor:
        """of_first[i]·first + of_second[i]·second, i of each sample or one for all."""
        if first.shape != second.shape:
            first, second = torch.broadcast_tensors(first, second)
        if len(indices) not in (1, len(first)):
            raise ValueError(
                f"timesteps are {len(indices)}; there must be one for each of {len(first)} samples or one for all"
            )
        first = self._promoted(first, second)
        t = torch.tensor(indices, device=first.device).expand(len(first)).contiguous()
        tables = (torch.tensor(table, device=first.device) for table in (of_first, of_second))
        mixed = q_sample(first, t, *tables, noise=second)
        assert isinstance(mixed, Tensor)
        return mixed
