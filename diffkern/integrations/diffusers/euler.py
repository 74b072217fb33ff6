"""EulerDiscreteScheduler: Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffkern.integrations.diffusers.exploding import ExplodingScheduler
from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.diffusers.spacing import custom_timesteps, fractional_timesteps
from diffkern.integrations.draws import Generators
from diffkern.ops import philox_normal
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram, chain, ddim, step_program


class EulerDiscreteScheduler(ExplodingScheduler):
    """Drop-in for diffusers' EulerDiscreteScheduler: same arguments, config, timesteps and, from a generator, numbers.

    Levels σ̂ are diffusers' float32 ones, coefficients are made of them in float64.
    """

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction", "original_sample")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        levels = np.append(self._sigma_table()[::-1], 0.0)
        self._schedule(self._times(np.arange(num_train_timesteps)[::-1], levels), levels, None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Sets `timesteps`, float32 (steps,), and `sigmas` (steps + 1,), by exactly one of the three.

        num_inference_steps: spaced as the config says. timesteps: these, falling in [0, T − 1], between
        whole numbers too. sigmas: these levels, the last being where the run ends; their timesteps are looked up.

        Raises ValueError for another number of arguments, numbers out of range, names in the config that it does not
        know, and timesteps where the config's spacing chooses the levels.
        """
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"exactly one of {', '.join(given)} must be given; they are {given}")
        table = self._sigma_table()
        if sigmas is not None:
            levels = _custom_sigmas(sigmas)
            visited = self._sigma_to_t(levels[:-1].astype(np.float32), self._log_sigma_table())
        else:
            if timesteps is not None:
                visited = self._custom_timesteps(timesteps)
            else:
                assert num_inference_steps is not None
                visited = fractional_timesteps(self.config, num_inference_steps)
            levels, visited = self._levels_at(visited.astype(np.float32).astype(np.float64), table)
        self.num_inference_steps = len(visited)
        self._schedule(self._times(visited, levels), levels, device)

    def _levels_at(self, timesteps: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The levels of a run, with the last, and its timesteps, which the levels decide where they are spaced."""
        n = len(timesteps)
        match self.config.interpolation_type:
            case "linear":
                levels = np.interp(timesteps, np.arange(len(table)), table)
            case "log_linear":
                levels = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), n + 1))
            case other:
                raise ValueError(f"interpolation_type is {other!r}; it may be 'linear' or 'log_linear'")
        spacing = self._spacing()
        if spacing is not None:
            levels = self._respaced(spacing, levels, n)
            timesteps = self._sigma_to_t(levels, self._log_sigma_table())
        match self.config.final_sigmas_type:
            case "zero":
                return np.append(levels, 0.0), timesteps
            case "sigma_min":
                return np.append(levels, table[0]), timesteps
            case other:
                raise ValueError(f"final_sigmas_type is {other!r}; it may be 'zero' or 'sigma_min'")

    def _continuous(self) -> bool:
        """Whether the network is told log(σ̂)/4 (EDM's c_noise, table 1) instead of a timestep."""
        kind = self.config.timestep_type
        if kind not in ("discrete", "continuous"):
            raise ValueError(f"timestep_type is {kind!r}; it may be 'discrete' or 'continuous'")
        return kind == "continuous" and self.config.prediction_type == "v_prediction"

    def _times(self, timesteps: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """What the network is told, float32."""
        return (0.25 * np.log(levels[:-1]) if self._continuous() else timesteps).astype(np.float32)

    def _custom_timesteps(self, timesteps: Sequence[float]) -> np.ndarray:
        if self._spacing() is not None or self._continuous():
            raise ValueError("timesteps cannot be given where the config spaces the sigmas or has continuous timesteps")
        return custom_timesteps(timesteps, self.config.num_train_timesteps, fractions=True)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next level, of sample's shape (N, C, …), in model_output's dtype, and the x0 seen, in
        sample's.

        Where s_churn is above 0 and s_tmin ≤ σ̂ ≤ s_tmax, the noise level is first raised to σ̂·(1+γ), γ =
        min(s_churn/steps, √2 − 1), with s_noise times unit normals; only then are numbers drawn. (The paper calls the
        network after that, diffusers' loop before.) `timestep` is read only at the first step of a run.

        Raises ValueError for an integer timestep and for one that is not in `timesteps`.
        """
        self._check_step(timestep)
        row = self._index(timestep)
        level = float(np.float32(self._levels[row]))  # as users see it, who compare with s_tmin and s_tmax
        gamma = min(s_churn / (len(self._levels) - 1), 2**0.5 - 1) if s_tmin <= level <= s_tmax else 0.0
        x0 = output_like(sample)
        if gamma > 0:
            z = self._unit_noise(model_output, sample, row, generator)
            x_next = self._advance(self._churn_program(gamma, s_noise), row, model_output, sample, [z, x0])
        else:
            x_next = self._advance(self._program(), row, model_output, sample, [x0])
        x_next = x_next.to(model_output.dtype)
        self._step_index = row + 1
        return SchedulerOutput(x_next, x0) if return_dict else (x_next, x0)

    def _program(self) -> StepProgram:
        if None not in self._programs:
            levels = self._checked_levels()
            steps = chain(np.ones_like(levels), levels, np.zeros(len(levels) - 1), self.prediction)
            self._programs[None] = ddim(steps, clip=None).with_x0()
        return self._programs[None]

    def _churn_program(self, gamma: float, s_noise: float) -> StepProgram:
        """x̂ = x + √(σ̂²−σ²)·s_noise·z and a step from there, z in slot 0 because x0, in slot 1, has its part of it."""
        key = (gamma, s_noise)
        if key not in self._programs:
            sigma, sigma_next = self._checked_levels()[:-1], self._levels[1:]
            raised = sigma * (1 + gamma)
            one = np.ones_like(sigma)
            # x0 from x̂; where it is v, diffusers converts it with the level that the network was told.
            a_x, a_m = {
                "eps": (one, -raised),
                "x0": (0 * one, one),
                "v": (1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)),
            }[self.prediction]
            noise = s_noise * np.sqrt(raised**2 - sigma**2)
            c_x = sigma_next / raised + (1 - sigma_next / raised) * a_x
            self._programs[key] = step_program(
                {
                    "a_x": a_x,
                    "a_m": a_m,
                    "c_x": c_x,
                    "c_m": (1 - sigma_next / raised) * a_m,
                    "c_h0": c_x * noise,
                    "g0_x": a_x,
                    "g0_m": a_m,
                    "g0_h0": a_x * noise,
                },
                np.zeros_like(sigma),
                writes=np.tile([1, -1], (len(sigma), 1)),
                num_slots=2,
            )
        return self._programs[key]

    def _unit_noise(self, model_output: Tensor, sample: Tensor, row: int, generator: Generators) -> Tensor:
        """z as a tensor of sample's dtype."""
        source: dict[str, Any] = self._noise_source(model_output, sample, generator)
        if "noise" in source:
            return source["noise"].to(sample.dtype)
        samples, device = source.get("samples", 0), sample.device
        return philox_normal(
            sample.shape, source["seed"], draw=row, samples=samples, stream=2, dtype=sample.dtype, device=device
        )

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = (ε − σ̂·x0)/√(σ̂²+1) at `timesteps`, (N,) or one for all, of the schedule; sample is x0.

        Raises ValueError for integers, which may be indices, and for a timestep that is not in `timesteps`.
        """
        if not timesteps.is_floating_point():
            raise ValueError(f"timesteps are {timesteps.dtype}; they must be of the scheduler's `timesteps`, floats")
        root = np.sqrt(self._levels**2 + 1)
        return self._at_levels(noise, sample, self._indices(timesteps), 1 / root, -self._levels / root)


def _custom_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    levels = np.asarray(sigmas, dtype=np.float64)
    if levels.ndim != 1 or levels.size < 2 or not (np.isfinite(levels).all() and (levels[:-1] > 0).all()):
        raise ValueError(f"sigmas are {levels.tolist()}; they must be at least two levels above 0, the last 0 or more")
    return levels
