"""PNDMScheduler: Liu et al. 2022, arXiv 2202.09778, with diffusers' interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.diffusers.scheduler import Scheduler
from diffkern.integrations.diffusers.spacing import spaced_timesteps
from diffkern.integrations.diffusers.steps import SingleSteps, single_steps
from diffkern.integrations.diffusers.tables import EndLevel
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram, Transitions, step_program
from diffkern.solvers.pndm import RUNGE_KUTTA_STEPS, WEIGHTS, transfer

Output = SchedulerOutput | tuple[Tensor]


class PNDMScheduler(Scheduler):
    """Drop-in for diffusers' PNDMScheduler: same arguments, config and timesteps.

    `ets` are the network's last outputs that multistep needs, `counter` how many calls were made, `cur_sample` the
    state that a step of several calls began with, `cur_model_output` the sum that Runge–Kutta is collecting, or 0.
    With v predicted it is v that is combined, as in diffusers, and made ε with the level of the step alone.

    Steps are computed in float32 whatever the sample's dtype.
    """

    final_alpha_cumprod = EndLevel()
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    pndm_order: ClassVar[int] = 4

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        self.final_alpha_cumprod = 1.0 if set_alpha_to_one else self._abar[0]
        self._timesteps = np.arange(num_train_timesteps)[::-1].copy()
        self.prk_timesteps: np.ndarray | None = None
        self.plms_timesteps: np.ndarray | None = None
        self.timesteps = None
        self._begin()

    def _begin(self) -> None:
        self.ets: list[Tensor] = []
        self.counter = 0
        self.cur_model_output: Tensor | int = 0
        self.cur_sample: Tensor | None = None

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Sets `timesteps`, int64, falling, in which those stand several times that are visited several times: first
        `prk_timesteps`, none with skip_prk_steps, then `plms_timesteps`.

        Raises ValueError for a number outside [1, num_train_timesteps], below 4 without skip_prk_steps, and for an
        unknown spacing.
        """
        falling = spaced_timesteps(self.config, num_inference_steps)
        if self.config.skip_prk_steps:
            prk = np.array([])
            plms = np.insert(falling, 1, falling[1]) if len(falling) > 1 else falling
        else:
            if num_inference_steps < self.pndm_order:
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}; `num_inference_steps` must be >= {self.pndm_order} "
                    "for Runge–Kutta to begin with; skip_prk_steps=True needs none"
                )
            begins, ends = falling[:RUNGE_KUTTA_STEPS], falling[1 : RUNGE_KUTTA_STEPS + 1]
            middles = ends + self.config.num_train_timesteps // num_inference_steps // 2
            prk = np.stack([begins, middles, middles, ends], axis=1).ravel()
            plms = falling[RUNGE_KUTTA_STEPS:]
        self.num_inference_steps = num_inference_steps
        self._timesteps = falling[::-1].copy()
        self.prk_timesteps, self.plms_timesteps = prk, plms.copy()
        self._set_timesteps(np.concatenate([prk, plms]).astype(np.int64), device)
        self._begin()

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Output:
        """The next state, of sample's shape (N, C, …), dtype and format: `step_prk` while those last, `step_plms` then.

        Raises ValueError before set_timesteps and for a timestep outside the process.
        """
        prk = 0 if self.prk_timesteps is None else len(self.prk_timesteps)
        one = self.step_prk if self.counter < prk and not self.config.skip_prk_steps else self.step_plms
        return one(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """One of the four calls of a step of Runge–Kutta (eq. 13); else as `step`."""
        stride, sample = self._stride(), self._promoted(sample, model_output)
        assert self.prk_timesteps is not None
        value, call = int(self._value(timestep)), self.counter % 4
        if call == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        begin = sample if self.cur_sample is None else self.cur_sample
        previous = value if self.counter % 2 else value - stride // 2
        start = int(self.prk_timesteps[self.counter // 4 * 4])
        so_far = [self.cur_model_output] if isinstance(self.cur_model_output, Tensor) else []
        if call == 3:
            weights = (1 / 6, 1.0)[: 1 + len(so_far)]
            x_next = self._move(weights, model_output, sample, so_far, begin, start, start - previous)
            self.cur_model_output = 0
        else:
            x_next, self.cur_model_output = self._move_and_collect(
                1 / 3 if call else 1 / 6, so_far, model_output, sample, begin, start, start - previous
            )
        self.counter += 1
        return SchedulerOutput(x_next) if return_dict else (x_next,)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Output:
        """A step of linear multistep (eq. 12) of as high an order as `ets` allows; the second call corrects the first,
        unless Runge–Kutta made it. Else as `step`; ValueError, too, where Runge–Kutta should have come first.
        """
        stride, sample = self._stride(), self._promoted(sample, model_output)
        if not self.config.skip_prk_steps and len(self.ets) < RUNGE_KUTTA_STEPS:
            raise ValueError(
                f"ets has {len(self.ets)} outputs; step_plms needs {RUNGE_KUTTA_STEPS}: let step_prk make the steps at "
                "prk_timesteps first, or set skip_prk_steps=True"
            )
        value, begin = int(self._value(timestep)), sample
        corrects = self.counter == 1
        start = value + stride if corrects else value
        if not corrects:
            self.ets = [*self.ets[-3:], model_output]
        newest_first = self.ets[::-1][: len(WEIGHTS)]
        weights: tuple[float, ...] = WEIGHTS[len(newest_first) - 1]
        if corrects and len(newest_first) == 1:
            weights = (0.5, 0.5)
            begin = sample if self.cur_sample is None else self.cur_sample
            self.cur_sample = None
        elif corrects:
            weights = (0.0, *weights)
        else:
            newest_first = newest_first[1:]
        if self.counter == 0:
            self.cur_sample = sample
        x_next = self._move(weights, model_output, sample, newest_first, begin, start, stride)
        self.counter += 1
        return SchedulerOutput(x_next) if return_dict else (x_next,)

    def _move(
        self,
        weights: tuple[float, ...],
        model_output: Tensor,
        sample: Tensor,
        history: Sequence[Tensor],
        begin: Tensor,
        start: int,
        stride: int,
    ) -> Tensor:
        """φ (eq. 11) from `begin` at timestep start down by stride, along weights·(model_output, *history)."""
        from_slot = begin is not sample
        key = (weights, from_slot, stride)
        if key not in self._programs:
            self._programs[key] = self._steps(stride, weights, from_slot)
        return self._run(key, start, model_output, sample, [*history, begin] if from_slot else history)

    def _move_and_collect(
        self,
        weight: float,
        so_far: Sequence[Tensor],
        model_output: Tensor,
        sample: Tensor,
        begin: Tensor,
        start: int,
        stride: int,
    ) -> tuple[Tensor, Tensor]:
        """φ along model_output alone, and the sum so_far + weight·model_output."""
        from_slot = begin is not sample
        key = (weight, len(so_far), from_slot, stride)
        if key not in self._programs:
            remember = {"g0_m": weight} | ({f"g0_h{int(from_slot)}": 1.0} if so_far else {})
            self._programs[key] = self._steps(stride, (1.0,), from_slot, remember, from_slot + len(so_far))
        total = output_like(sample)
        slots = [*([begin] if from_slot else []), *so_far, total]
        return self._run(key, start, model_output, sample, slots), total

    def _run(
        self, key: tuple[object, ...], start: int, model_output: Tensor, sample: Tensor, slots: Sequence[Tensor]
    ) -> Tensor:
        steps: SingleSteps = self._programs[key]
        slots = [slot.to(sample.dtype) for slot in slots]
        return self._advance(steps.program, steps.row(start), model_output, sample, slots or None)

    def _steps(
        self,
        stride: int,
        weights: tuple[float, ...],
        from_slot: bool,
        remember: dict[str, float] | None = None,
        written: int = -1,
    ) -> SingleSteps:
        """A row for every timestep of the process, down by stride. Slots are the history, then the state if it comes
        from one, then what `remember` reads or writes."""
        starts, history = np.arange(len(self._abar)), len(weights) - 1

        def table(steps: Transitions) -> StepProgram:
            phi = transfer(steps.alpha, steps.sigma, steps.alpha_next, steps.sigma_next)
            # Along ε = e_x·(the state) + e_m·(the weighted outputs), whichever the network predicts.
            of_output = phi.of_eps * steps.e_m
            named = {f"c_h{k}": of_output * weight for k, weight in enumerate(weights[1:])}
            named[f"c_h{history}" if from_slot else "c_x"] = phi.of_x + phi.of_eps * steps.e_x
            named["c_m"] = of_output * weights[0]
            named |= {name: np.full(len(starts), value) for name, value in (remember or {}).items()}
            slots = max(history + from_slot, written + 1)
            return step_program(named, starts, writes=np.tile([written, -1], (len(starts), 1)), num_slots=slots)

        before = PNDMScheduler.final_alpha_cumprod.number(self)
        after = self._abar_at(starts - stride, before)
        return single_steps(self._abar, starts, after, self.prediction, table, from_noise=False)
