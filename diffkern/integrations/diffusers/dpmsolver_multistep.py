"""DPMSolverMultistepScheduler: Lu et al. 2022, arXiv 2206.00927 and 2211.01095, with diffusers' interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import deprecate
from torch import Tensor

from diffkern.integrations.diffusers.multistep import MultistepScheduler, given
from diffkern.integrations.diffusers.outputs import SchedulerOutput
from diffkern.integrations.draws import Generators
from diffkern.solvers.dpm_multistep import ALGORITHMS, SOLVER_TYPES, dpm_multistep

FEW_STEPS = 15  # below which lower_order_final matters


class DPMSolverMultistepScheduler(MultistepScheduler):
    """Drop-in for diffusers' DPMSolverMultistepScheduler: same arguments, config, timesteps, sigmas and, from a
    generator, numbers.

    Steps are computed in float32, or float64 for such samples, whatever model_output's dtype is.
    """

    spacings = {  # noqa: RUF012
        "use_karras_sigmas": "karras",
        "use_lu_lambdas": "lu",
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
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        noise: str = "torch",
    ) -> None:
        self._set_up(noise)
        if solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order is {solver_order!r}; it may be 1, 2 or 3")
        if algorithm_type in ("dpmsolver", "sde-dpmsolver"):
            deprecate(
                "algorithm_types dpmsolver and sde-dpmsolver",
                "1.0.0",
                f"diffusers is to drop the algorithm_type {algorithm_type}; use 'dpmsolver++' or 'sde-dpmsolver++'.",
            )
        if algorithm_type == "deis":
            self.register_to_config(algorithm_type="dpmsolver++")
        elif algorithm_type not in ALGORITHMS:
            raise NotImplementedError(
                f"algorithm_type is {algorithm_type!r}; it may be one of {', '.join(map(repr, ALGORITHMS))}"
            )
        if solver_type in ("logrho", "bh1", "bh2"):
            self.register_to_config(solver_type="midpoint")
        elif solver_type not in SOLVER_TYPES:
            raise NotImplementedError(
                f"solver_type is {solver_type!r}; it may be one of {', '.join(map(repr, SOLVER_TYPES))}"
            )
        if not self._data_prediction() and final_sigmas_type == "zero":
            raise ValueError(
                f"final_sigmas_type is 'zero', to which the algorithm_type {algorithm_type!r} cannot lead; "
                "use 'sigma_min'"
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Sets `timesteps`, int64 (steps,), falling, on `device`, and `sigmas`; the run before is forgotten.

        num_inference_steps: spaced as the config says; or timesteps: the process's own, any of them. mu: the log of the
        flow_shift, with use_dynamic_shifting. Raises ValueError for neither or both of the first two, a number outside
        [1, num_train_timesteps], timesteps outside the process or with sigmas spaced otherwise, and an unknown spacing.
        """
        if mu is not None:
            if not (self.config.use_dynamic_shifting and self.config.time_shift_type == "exponential"):
                raise ValueError("mu is given; it needs use_dynamic_shifting and time_shift_type 'exponential'")
            self.register_to_config(flow_shift=float(np.exp(mu)))
        config = self.config
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("num_inference_steps and timesteps: one of them must be given, and not both")
        spacing, total = self._spacing(), config.num_train_timesteps
        table = self._sigma_table()
        final = self._final_sigma(table[0])
        if timesteps is not None:
            if spacing is not None or config.use_flow_sigmas:
                raise ValueError("timesteps cannot be given where the config spaces the sigmas itself")
            visited = np.array(timesteps).astype(np.int64)
            if visited.ndim != 1 or not visited.size or visited.min() < 0 or visited.max() >= total:
                raise ValueError(f"timesteps are {timesteps}; they must be a list of numbers in [0, {total})")
            levels = table[visited]
        else:
            assert num_inference_steps is not None
            # Timesteps whose λ is below lambda_min_clipped are left out.
            clipped = torch.searchsorted(self.lambda_t.flip(0), config.lambda_min_clipped).item()
            visited = self._even_timesteps(num_inference_steps, total - int(clipped))
            levels = np.interp(visited, np.arange(len(table)), table)
            if spacing is not None:
                rounded = spacing in ("karras", "lu") and config.beta_schedule != "squaredcos_cap_v2"
                visited = self._spaced_timesteps(spacing, num_inference_steps, rounded)
                levels = self._spaced_levels(spacing, table, num_inference_steps)
            elif config.use_flow_sigmas:
                even, shift = 1.0 - np.linspace(1, 1 / total, num_inference_steps + 1), config.flow_shift
                levels = (shift * even / (1 + (shift - 1) * even))[:0:-1]
                visited = (levels * total).astype(np.int64)
        self._schedule(visited, np.append(levels, final), device)
        self.num_inference_steps = len(visited)
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next x of the schedule, of sample's shape (N, C, …) and format.

        model_output: of sample's shape, or with variance_type "learned" or "learned_range" with further channels, which
        are not used. Its dtype with sample's together is the result's; model_output's alone where it is what the solver
        remembers ("sample" of the ++ algorithms, "epsilon" of the others). `timestep` says where a run begins, unless
        `set_begin_index` did. The sde algorithms draw float32 noise from `generator`, or take variance_noise.

        Raises ValueError before set_timesteps and after the last step.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None; call set_timesteps before step")
        row = self._index(timestep)
        x, output = self._operands(model_output, sample)
        source: dict[str, Any] = {}
        if self.config.algorithm_type.startswith("sde-"):
            if variance_noise is None:
                # diffusers draws float32 numbers whatever the dtypes are.
                single = output if output.dtype == torch.float32 else output.to(torch.float32)
                source = self._noise_source(single, sample, generator)
            else:
                source = {"noise": variance_noise.to(x.device, torch.float32)}
        available = min(self.lower_order_nums, self.config.solver_order - 1)
        programs = self._programs
        key = (available, len(self.timesteps))
        if key not in programs:
            programs[key] = self._program(available)
        program = programs[key]
        slots = self._remembered(program, row, x)
        x_next = self._advance(program, row, output, x, slots, **source)
        self._push(slots[row % len(slots)])
        self._step_index = row + 1
        if x_next.dtype != model_output.dtype and self._remembers_output():
            x_next = x_next.to(model_output.dtype)
        return SchedulerOutput(x_next) if return_dict else (x_next,)

    def _program(self, available: int) -> Any:
        """The steps where `available` earlier predictions are remembered."""
        config, rows = self.config, len(self._levels) - 1
        orders = np.full(rows, config.solver_order)
        # The last step is that of the last of `timesteps`, which users cut short.
        last = min(rows, len(self.timesteps)) - 1
        few = config.lower_order_final and len(self.timesteps) < FEW_STEPS
        if few:
            orders[max(last - 1, 0) : last] = min(config.solver_order, 2)
        if few or config.euler_at_final or config.final_sigmas_type == "zero":
            orders[last] = 1
        return dpm_multistep(
            self._transitions(),
            orders=np.minimum(orders, available + 1),
            clip=None,
            threshold=self._threshold(),
            **self._solver(),
        )

    def _solver(self) -> dict[str, Any]:
        return {
            "algorithm": self.config.algorithm_type,
            "solver_type": self.config.solver_type,
            "third": "diffusers",
            "history": self.config.solver_order,
        }

    def _data_prediction(self) -> bool:
        return bool(self.config.algorithm_type.endswith("++"))

    def _remembers_output(self) -> bool:
        if self._data_prediction():
            return bool(self.config.prediction_type == "sample")
        return self.config.prediction_type == "epsilon" and not self.config.thresholding

    def _learned(self) -> bool:
        return self.config.variance_type in ("learned", "learned_range")

    # Steps of a given order from predictions that were converted already.

    def dpm_solver_first_order_update(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The next x by a step of first order; model_output as `convert_model_output` gives it."""
        _, _, sample = given(args, kwargs, ("timestep", "prev_timestep"), sample=sample)
        return self._update([model_output], sample, noise)

    def multistep_dpm_solver_second_order_update(
        self,
        model_output_list: Sequence[Tensor],
        *args: Any,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The next x by a step of second order; the last two of model_output_list, the newest last."""
        _, _, sample = given(args, kwargs, ("timestep_list", "prev_timestep"), sample=sample)
        return self._update(list(model_output_list[-2:]), sample, noise)

    def multistep_dpm_solver_third_order_update(
        self,
        model_output_list: Sequence[Tensor],
        *args: Any,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The next x by a step of third order; the last three of model_output_list, the newest last."""
        _, _, sample = given(args, kwargs, ("timestep_list", "prev_timestep"), sample=sample)
        return self._update(list(model_output_list[-3:]), sample, noise)

    def _update(self, outputs: list[Tensor], sample: Tensor, noise: Tensor | None) -> Tensor:
        order, row = len(outputs), self._current()
        if ("update", order) not in self._programs:
            steps = self._transitions()
            none, one = np.zeros(steps.num_rows), np.ones(steps.num_rows)
            converted = replace(steps, a_x=none, a_m=one, e_x=none, e_m=one)
            options = {**self._solver(), "history": order}
            self._programs["update", order] = dpm_multistep(converted, orders=order, clip=None, **options)
        program = self._programs["update", order]
        slots = [sample] * order
        for back, output in enumerate(reversed(outputs)):
            slots[(row - back) % order] = output.to(sample.dtype)
        slots[row % order] = torch.empty_like(sample)
        source = {} if noise is None else {"noise": noise}
        return self._advance(program, row, outputs[-1], sample, slots, **source)
