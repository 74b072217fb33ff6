"""UniPCMultistepScheduler: Zhao et al. 2023, arXiv 2302.04867, with diffusers' interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffkern.integrations.diffusers.multistep import MultistepScheduler
from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.ops._memory import output_like
from diffkern.solvers.program import StepProgram
from diffkern.solvers.unipc import VARIANTS, unipc

RING = 2  # where the predictions begin among the slots; before them lie the last two states
TIME_SHIFTS = ("exponential", "linear")
BELOW_ONE = 1e-6


class UniPCMultistepScheduler(MultistepScheduler):
    """Drop-in for diffusers' UniPCMultistepScheduler: same arguments, config, timesteps and sigmas.

    Corrector and predictor are one pass, in float32, or float64 for such samples.
    `last_sample` is the state that the last step started from, corrected; `this_order` that step's order.
    """

    spacings = {  # noqa: RUF012
        "use_karras_sigmas": "karras",
        "use_exponential_sigmas": "exponential",
        "use_beta_sigmas": "beta",
    }

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: list[int] = [],  # noqa: B006  # the default that diffusers registers
        solver_p: SchedulerMixin | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
        noise: str = "torch",
    ) -> None:
        self.predict_x0 = predict_x0
        self.disable_corrector = disable_corrector
        self.solver_p: Any = solver_p
        self.this_order = 0
        self._set_up(noise)
        if not isinstance(solver_order, int) or solver_order < 1:
            raise ValueError(f"solver_order is {solver_order!r}; it must be an int, at least 1")
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError("shift_terminal is given; it needs use_flow_sigmas=True")
        if solver_type in ("midpoint", "heun", "logrho"):
            self.register_to_config(solver_type="bh2")
        elif solver_type not in VARIANTS:
            raise NotImplementedError(
                f"solver_type is {solver_type!r}; it may be one of {', '.join(map(repr, VARIANTS))}"
            )

    def _forget(self) -> None:
        super()._forget()
        self.timestep_list: list[int | Tensor | None] = [None] * self.config.solver_order
        self.last_sample: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Sets `timesteps`, int64 (steps,), falling, on `device`, and `sigmas`; the run before is forgotten.

        num_inference_steps: spaced as the config says; or sigmas, the flow's levels before their shift, falling. mu:
        the shift of use_dynamic_shifting, which needs it. Raises ValueError for neither, a number outside
        [1, num_train_timesteps], sigmas without use_flow_sigmas or with another spacing, and unknown names.
        """
        config, total = self.config, self.config.num_train_timesteps
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("mu is None; use_dynamic_shifting needs it")
        spacing = self._spacing()
        if sigmas is not None:
            if not config.use_flow_sigmas or spacing is not None:
                raise ValueError("sigmas are given; they need use_flow_sigmas=True and no other spacing")
            given = np.asarray(sigmas, dtype=np.float64)
            if given.ndim != 1 or not (given > 0).all() or (given[1:] > given[:-1]).any():
                raise ValueError(f"sigmas are {given.tolist()}; they must fall and stay above 0")
            num_inference_steps = len(sigmas)
        if num_inference_steps is None:
            raise ValueError("num_inference_steps is None; it or sigmas must be given")
        visited = self._even_timesteps(num_inference_steps, total)
        table = self._sigma_table()
        if spacing is not None:
            levels = self._spaced_levels(spacing, table, num_inference_steps)
            if spacing == "karras" and config.use_flow_sigmas:
                levels = levels / (levels + 1)
                visited = (levels * total).astype(np.int64)
            else:
                visited = self._spaced_timesteps(spacing, num_inference_steps, rounded=spacing == "karras")
        elif config.use_flow_sigmas:
            levels = self._flow_levels(num_inference_steps, sigmas, mu)
            visited = (levels * total).astype(np.int64)
        else:
            levels = np.interp(visited, np.arange(len(table)), table)
        even = spacing is None and not config.use_flow_sigmas
        final = self._final_sigma(table[0] if even else levels[-1])
        self._schedule(visited, np.append(levels, final), device)
        self.num_inference_steps = len(visited)
        self._forget()
        if self.solver_p is not None:
            self.solver_p.set_timesteps(self.num_inference_steps, device=device)

    def _flow_levels(self, n: int, sigmas: Sequence[float] | None, mu: float | None) -> np.ndarray:
        total = self.config.num_train_timesteps
        levels = np.linspace(1, 1 / total, n + 1)[:-1] if sigmas is None else np.array(sigmas, dtype=np.float64)
        if self.config.use_dynamic_shifting:
            assert mu is not None
            levels = self.time_shift(mu, 1.0, levels)
        else:
            shift = self.config.flow_shift
            levels = shift * levels / (1 + (shift - 1) * levels)
        if self.config.shift_terminal:
            levels = self.stretch_shift_to_terminal(levels)
        if abs(levels[0] - 1) < BELOW_ONE:
            levels[0] -= BELOW_ONE
        return levels

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Levels t in (0, 1], shifted: e^mu/(e^mu + (1/t − 1)^sigma); "linear" has mu in the place of e^mu."""
        kind = self.config.time_shift_type
        if kind not in TIME_SHIFTS:
            raise ValueError(f"time_shift_type is {kind!r}; it may be one of {', '.join(map(repr, TIME_SHIFTS))}")
        shift = math.exp(mu) if kind == "exponential" else mu
        return shift / (shift + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels stretched so that the last is the config's shift_terminal, and 1 stays 1."""
        clean = 1 - t
        if not clean[-1] > 0:
            raise ValueError(
                "shift_terminal is given; it needs a run of two steps or more, whose last level is below 1"
            )
        return 1 - clean / (clean[-1] / (1 - self.config.shift_terminal))

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next x of the schedule, of sample's shape (N, C, …), dtype and format.

        model_output: of sample's shape. `timestep` says where a run begins, unless `set_begin_index` did.
        Raises ValueError before set_timesteps and after the last step.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None; call set_timesteps before step")
        row = self._index(timestep)
        x, output = self._operands(model_output, sample)
        corrects = row > 0 and row - 1 not in self.disable_corrector and self.last_sample is not None
        available = min(self.lower_order_nums, self.config.solver_order)
        key = (available, corrects, self.predict_x0, self.solver_p is None, len(self.timesteps))
        programs = self._programs
        if key not in programs:
            programs[key] = self._program(available, corrects)
        program = programs[key]
        slots = self._remembered(program, row, x, RING)
        if corrects:
            assert self.last_sample is not None
            slots[(row - 1) % 2] = self.last_sample.to(x.dtype)
        slots[row % 2] = output_like(x)
        x_next = self._advance(program, row, output, x, slots)
        self.this_order = min(self._wanted_orders()[row].item(), self.lower_order_nums + 1)
        self.last_sample = slots[row % 2]
        self._push(slots[RING + row % (len(slots) - RING)])
        self.timestep_list = [*self.timestep_list[1:], timestep]
        if self.solver_p is not None:
            x_next = self.solver_p.step(model_output, timestep, x_next).prev_sample
        self._step_index = row + 1
        x_next = x_next.to(sample.dtype)
        return SchedulerOutput(x_next) if return_dict else (x_next,)

    def _wanted_orders(self) -> np.ndarray:
        """Of each step's predictor, once there are enough predictions."""
        order, rows = self.config.solver_order, len(self._levels) - 1
        if not self.config.lower_order_final:
            return np.full(rows, order)
        # The last step is that of the last of `timesteps`, which users cut short.
        return np.clip(min(rows, len(self.timesteps)) - np.arange(rows), 1, order)

    def _program(self, available: int, corrects: bool) -> StepProgram:
        """The steps where `available` earlier predictions are remembered, and the last state if they correct it."""
        wanted = self._wanted_orders()
        corrector = np.append(0, np.minimum(wanted, available)[:-1]) if corrects else np.zeros_like(wanted)
        return unipc(
            self._transitions(),
            orders=np.minimum(wanted, available + 1),
            variant=self.config.solver_type,
            predict_x0=self.predict_x0,
            corrector=corrector,
            predictor=self.solver_p is None,
            clip=None,
            threshold=self._threshold(),
            history=self.config.solver_order + 1,
        )

    def _data_prediction(self) -> bool:
        return bool(self.predict_x0)

    def _threshold(self) -> tuple[float, float] | None:
        return super()._threshold() if self.predict_x0 else None
