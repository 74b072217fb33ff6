"""What the multistep schedulers share: their levels, how they read predictions, and the predictions they remember."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import deprecate
from numpy.typing import ArrayLike
from torch import Tensor

from diffkern.integrations.diffusers.sigmas import SigmaScheduler
from diffkern.integrations.diffusers.spacing import SPACINGS, check_steps
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram, Transitions, step_program
from diffkern.solvers.dpm_multistep import newest_columns

FINAL_SIGMAS = ("zero", "sigma_min")


class MultistepScheduler(SigmaScheduler):
    """A scheduler of α·x0 + σ·ε, α² + σ² = 1, or α = 1 − σ with flow sigmas, that looks back on earlier predictions.

    `model_outputs` holds them, the newest last: x0 (N, C, …) or ε, None where there is none yet; `lower_order_nums`
    counts those of this run. Both may be assigned.
    """

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction", "flow_prediction")
    spacings: ClassVar[dict[str, str]]  # the config's flags, and diffkern's names; the first that is set counts

    def _set_up(self, noise: str) -> None:
        super()._set_up(noise)
        if self.config.rescale_betas_zero_snr:
            # σ̂ is not to be infinite where ᾱ is 0: diffusers takes the least number that float16 has.
            self._use_alphas_cumprod(np.append(self._abar[:-1], 2.0**-24))
        self.alpha_t = torch.sqrt(self.alphas_cumprod)
        self.sigma_t = torch.sqrt(1 - self.alphas_cumprod)
        self.lambda_t = torch.log(self.alpha_t) - torch.log(self.sigma_t)
        self._use_sigmas(self._sigma_table())
        last = self.config.num_train_timesteps - 1
        self._set_timesteps(np.arange(last, -1, -1, dtype=np.float32), None)
        self._forget()

    def _forget(self) -> None:
        self.model_outputs: list[Tensor | None] = [None] * self.config.solver_order
        self.lower_order_nums = 0

    # Timesteps and levels.

    def _even_timesteps(self, num_inference_steps: int, last: int) -> np.ndarray:
        """int64, falling, in [0, last), as config.timestep_spacing says; "trailing" may give another number of them."""
        total = self.config.num_train_timesteps
        check_steps(num_inference_steps, total)
        match self.config.timestep_spacing:
            case "linspace":
                rising = np.linspace(0, last - 1, num_inference_steps + 1).round().astype(np.int64)
            case "leading":
                rising = np.arange(num_inference_steps + 1, dtype=np.int64) * (last // (num_inference_steps + 1))
                rising += self.config.steps_offset
            case "trailing":
                return np.arange(last, 0, -total / num_inference_steps).round().astype(np.int64) - 1
            case other:
                raise ValueError(f"timestep_spacing is {other!r}; it may be one of {', '.join(map(repr, SPACINGS))}")
        return rising[:0:-1]

    def _spacing(self) -> str | None:
        # The config may hold flags of other classes, whose configs this one was made from.
        asked = [flag for flag in self.spacings if self.config[flag]]
        excluding = [flag for flag in asked if flag != "use_lu_lambdas"]
        if len(excluding) > 1:
            raise ValueError(f"{', '.join(excluding)} are all True; only one of them may be")
        return self.spacings[asked[0]] if asked else None

    def _spaced_levels(self, spacing: str, table: np.ndarray, n: int) -> np.ndarray:
        """n levels, falling, within a table of rising ones."""
        if spacing == "lu":
            return np.exp(self._convert_to_lu(np.log(table)[::-1], n))
        return self._respaced(spacing, table[::-1], n)

    def _spaced_timesteps(self, spacing: str, n: int, rounded: bool) -> np.ndarray:
        """int64 (n,), the timesteps of the levels; those between two are cut off to whole ones unless rounded.

        Found as diffusers finds them, in float32: in better tables a whole number is cut off elsewhere.
        """
        single = torch.as_tensor(self._abar, dtype=torch.float32)
        table = (((1 - single) / single) ** 0.5).numpy()
        levels = self._spaced_levels(spacing, table, n)
        timesteps = self._sigma_to_t(levels, np.log(table))
        return (timesteps.round() if rounded else timesteps).astype(np.int64)

    def _convert_to_lu(self, in_lambdas: ArrayLike, num_inference_steps: int) -> np.ndarray:
        """log σ̂ evenly from the first to the last of in_lambdas (Lu et al. 2022, arXiv 2211.01095, section 7.1)."""
        first, last = (float(np.asarray(in_lambdas)[end]) for end in (0, -1))
        return first + np.linspace(0, 1, num_inference_steps) * (last - first)

    def _final_sigma(self, sigma_min: float) -> float:
        """The level that the last step leads to."""
        kind = self.config.final_sigmas_type
        if kind not in FINAL_SIGMAS:
            raise ValueError(f"final_sigmas_type is {kind!r}; it may be one of {', '.join(map(repr, FINAL_SIGMAS))}")
        return 0.0 if kind == "zero" else sigma_min

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The step of a timestep in `timesteps`, or in schedule_timesteps; of several the second.

        The last for a timestep that is not there, as in diffusers.
        """
        given = schedule_timesteps is not None and schedule_timesteps is not self.timesteps
        schedule = schedule_timesteps.cpu().numpy() if given else self._host_timesteps()  # type: ignore[union-attr]
        found = np.flatnonzero(schedule == self._value(timestep))
        return int(found[min(1, found.size - 1)]) if found.size else len(self.timesteps) - 1

    def _level_pair(self) -> tuple[np.ndarray, np.ndarray]:
        return self._sigma_to_alpha_sigma_t(self._levels)

    def _sigma_to_alpha_sigma_t(self, sigma: Any) -> tuple[Any, Any]:
        """(α, σ) of levels, tensors or arrays of any shape."""
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha

    # Predictions.

    def _data_prediction(self) -> bool:
        """Whether x0 is what is remembered, or ε."""
        raise NotImplementedError

    def _transitions(self) -> Transitions:
        """The steps between `sigmas`, and x0 and ε of the network's output as diffusers reads it at any level.

        Raises ValueError for a prediction type that there is not, and for levels above 1 of a flow.
        """
        levels = self._checked_levels()
        alpha, sigma = self._level_pair()
        if (alpha < 0).any():
            raise ValueError(
                f"sigmas reach {levels.max()}, but use_flow_sigmas is True, whose sigmas are at most 1; "
                "leave out the other spacing, or use_flow_sigmas"
            )
        a, s, level = alpha[:-1], sigma[:-1], levels[:-1]
        none, one, flow = np.zeros_like(a), np.ones_like(a), self.config.use_flow_sigmas
        with np.errstate(divide="ignore"):
            x0, eps = {
                "eps": ((1 / a, -s / a), (none, one)),
                "x0": ((none, one), (1 / s, -a / s)),
                # x0 of the ε algorithms is that of their ε, which matters where α² + σ² is not 1.
                "v": ((a if self._data_prediction() or not flow else (1 - s * s) / a, -s), (s, a)),
                "flow": ((one, -level), (one, 1 - level)),
            }[self.prediction]
        if self.prediction == "flow" and not self._data_prediction():
            raise ValueError(
                "prediction_type is 'flow_prediction', which is for algorithms that predict x0; with those that "
                "predict noise it may be one of 'epsilon', 'sample', 'v_prediction'"
            )
        return Transitions(a, s, alpha[1:], sigma[1:], np.arange(len(a), dtype=np.float64), *x0, *eps)

    def _dynamic(self) -> tuple[float, float]:
        ratio, largest = super()._dynamic()
        # diffusers' quantile 0 is the least value; a program's lies above 0, by as little as one likes.
        return max(ratio, float(np.finfo(np.float64).tiny)), largest

    def convert_model_output(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """x0, or ε, as this solver reads it at the current step: of sample's shape, in the dtype of both together.

        A timestep, which used to be the second argument, is not needed.
        """
        timestep, sample = given(args, kwargs, ("timestep",), sample=sample)
        if timestep is not None:
            deprecate("timesteps", "1.0.0", "convert_model_output goes by step_index; leave the timestep out.")
        if "convert" not in self._programs:
            steps = self._transitions()
            self._programs["convert"] = step_program(
                {**steps.x0_columns(), **{f"c_{name}": c for name, c in self._newest(steps).items()}},
                steps.times,
                threshold=self._threshold(),
            )
        x, output = self._operands(model_output, sample)
        return self._advance(self._programs["convert"], self._current(), output, x)

    def _newest(self, steps: Transitions) -> dict[str, np.ndarray]:
        return newest_columns(steps, self._data_prediction(), self._threshold() is not None)

    def _current(self) -> int:
        if self._step_index is None:
            raise ValueError("step_index is None; call step, or _init_step_index, first")
        return self._step_index

    def _operands(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(x, m): both in the dtype of the arithmetic's result, m without channels of variance."""
        sample = self._promoted(sample, model_output)
        if model_output.dim() > 1 and sample.dim() > 1 and model_output.shape[1] > sample.shape[1] and self._learned():
            model_output = model_output[:, : sample.shape[1]]
        return sample, model_output

    def _learned(self) -> bool:
        """Whether the network says a variance in further channels, which these solvers have no use for."""
        return False

    # The step.

    def _remembered(self, program: StepProgram, row: int, x: Tensor, first: int = 0) -> list[Tensor]:
        """The slots of a program whose ring of predictions begins at `first`; where the row writes is new memory.

        The j-th prediction back lies in slot (row − j) of the ring; a slot that the row does not read holds x.
        """
        size = program.num_slots - first
        slots = [x] * program.num_slots
        for back in range(1, min(size - 1, len(self.model_outputs)) + 1):
            output = self.model_outputs[-back]
            if output is not None:
                slots[first + (row - back) % size] = output.to(x.dtype)
        slots[first + row % size] = output_like(x)
        return slots

    def _push(self, newest: Tensor) -> None:
        outputs = self.model_outputs
        outputs[:-1] = outputs[1:]
        outputs[-1] = newest
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)


def given(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...], **needed: Any) -> tuple[Any, ...]:
    """Arguments that older versions of diffusers took by position, `names`, before those that are needed."""
    found = (
        dict(zip((*names, *needed), args, strict=False)) | kwargs | {k: v for k, v in needed.items() if v is not None}
    )
    for name in needed:
        if found.get(name) is None:
            raise ValueError(f"{name} is None; it must be given")
    return tuple(found.get(name) for name in (*names, *needed))
