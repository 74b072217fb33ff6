"""What all of diffkern's diffusers schedulers share: tables, timesteps, noise, and the one step that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from diffkern.integrations.diffusers import gradients
from diffkern.integrations.diffusers.tables import make_betas
from diffkern.integrations.draws import Generators, check_noise, noise_source
from diffkern.ops import q_sample, solver_step
from diffkern.solvers import StepProgram, step_program

PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


class Scheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # their bases disagree on config_name's type
    """A diffusers scheduler whose step is a row of a StepProgram.

    `noise` is "torch", the numbers that diffusers would draw from the same generator, or "philox" (faster: made where
    they are used from a number drawn from it); it is an attribute, no part of the config.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012
    ignore_for_config = ["noise"]  # noqa: RUF012
    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    order: ClassVar[int] = 1
    init_noise_sigma: Any = 1.0
    config: Any
    timesteps: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A saved pipeline names the module of its scheduler, and looks for diffusers' SchedulerMixin there too.
        if cls.__module__.startswith(f"{__package__}."):
            cls.__module__ = __package__
        # Steps are looked up and built on the host: torch.compile goes around them.
        if "step" in vars(cls):
            setattr(cls, "step", torch.compiler.disable(vars(cls)["step"]))  # noqa: B010

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, *, noise: str = "torch", **kwargs: Any
    ) -> Any:
        """As diffusers has it; `noise`, which no config holds, is taken here and by `from_pretrained`."""
        check_noise(noise)
        made: Any = super().from_config(config, return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).noise = noise
        return made

    def _set_up(self, noise: str) -> None:
        """To be called by every constructor, once the config is registered."""
        self.noise = check_noise(noise)
        self.betas = make_betas(self.config, self.beta_schedules)
        self.alphas = 1.0 - self.betas
        self._alphas_cumprod: Tensor
        self._use_alphas_cumprod(torch.cumprod(self.alphas, 0).double().numpy())
        self.num_inference_steps: int | None = None

    # ᾱ: users read it, move it to a device and, at times, replace it.

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ (T,), float32 as diffusers has it. A new one, of any dtype, replaces the table that all steps come from."""
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, table: Tensor) -> None:
        values = table.detach().cpu().double().numpy()
        if not np.array_equal(values, self._abar):  # not those that were read from here and moved to a device
            self._use_alphas_cumprod(values)
        if table.dtype != self._alphas_cumprod.dtype:
            self._forget_programs()
        self._alphas_cumprod = table

    def _use_alphas_cumprod(self, table: np.ndarray) -> None:
        self._abar = table
        self._alphas_cumprod = torch.tensor(table, dtype=torch.float32)
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._forget_programs()

    # Programs are built when a step needs them, and forgotten when what they were made of changes.

    @property
    def _programs(self) -> dict[Any, Any]:
        """Programs by whatever tells a class's apart, of the present config, tables and timesteps."""
        config, programs = self._built
        if config is not self.config:
            self._forget_programs()
            return self._built[1]
        return programs

    def _forget_programs(self) -> None:
        self._built: tuple[Any, dict[Any, Any]] = (self.config, {})  # anew: a shallow copy keeps its own

    @property
    def prediction(self) -> str:
        """The config's prediction_type in diffkern's name; ValueError for one that the class does not have."""
        if self.config.prediction_type not in self.predictions:
            raise ValueError(
                f"prediction_type is {self.config.prediction_type!r}; "
                f"it may be one of {', '.join(map(repr, self.predictions))}"
            )
        return PREDICTIONS[self.config.prediction_type]

    def _abar_at(self, timesteps: np.ndarray, before: float) -> np.ndarray:
        """ᾱ at whole `timesteps` below T, float64; `before` at negative ones."""
        return np.where(timesteps < 0, before, self._abar[np.maximum(timesteps, 0)])

    # Timesteps: what they are is known on the host, so that a step need not ask the device.

    def _set_timesteps(self, timesteps: np.ndarray, device: torch.device | str | None) -> None:
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self._remember(timesteps)

    def _remember(self, timesteps: np.ndarray) -> None:
        self._known = (self.timesteps, _version(self.timesteps), timesteps)
        self._forget_programs()

    def _host_timesteps(self) -> np.ndarray:
        """The values of `timesteps`, read from the device only if somebody replaced the tensor or wrote to it."""
        tensor, version, timesteps = self._known
        if tensor is not self.timesteps or version != _version(tensor):
            timesteps = self.timesteps.cpu().numpy().copy()
            self._remember(timesteps)
        return timesteps

    def _position(self, timestep: Tensor) -> int | None:
        """Which element of `timesteps` this tensor is, by where it lies in memory; None if it is none of them."""
        steps = self.timesteps
        if timestep.dtype != steps.dtype or timestep.device != steps.device or timestep.numel() != 1:
            return None
        offset = timestep.data_ptr() - steps.data_ptr()
        stride = steps.element_size() * max(steps.stride(0), 1)
        return offset // stride if 0 <= offset < stride * len(steps) and offset % stride == 0 else None

    def _value(self, timestep: float | Tensor) -> float:
        """The timestep as a number. Elements of `timesteps` and numbers cost nothing; another tensor is read."""
        if not isinstance(timestep, Tensor):
            return timestep
        position = self._position(timestep)
        if position is not None:
            return self._host_timesteps()[position].item()
        if timestep.numel() != 1:
            raise ValueError(f"timestep is a tensor of shape {tuple(timestep.shape)}; it must be one number")
        return timestep.item()

    def _stride(self) -> int:
        """How many of the process's timesteps one of num_inference_steps spans; ValueError before set_timesteps."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None; call set_timesteps before step")
        return int(self.config.num_train_timesteps // self.num_inference_steps)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """`sample` itself: this scheduler's model sees the state as it is."""
        return sample

    # The step.

    def _clip(self) -> tuple[float, float] | None:
        """Of x0, for a program; dynamic thresholding takes its place."""
        size = self.config.clip_sample_range
        return (-size, size) if self.config.clip_sample and not self.config.get("thresholding") else None

    def _threshold(self) -> tuple[float, float] | None:
        """Of dynamic thresholding, for a program."""
        if not self.config.thresholding:
            return None
        return self._dynamic()

    def _dynamic(self) -> tuple[float, float]:
        return self.config.dynamic_thresholding_ratio, self.config.sample_max_value

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """x0 under dynamic thresholding alone (Saharia et al. 2022, arXiv 2205.11487, section 2.3), as steps do it."""
        program = step_program({"a_x": [1.0], "c_0": [1.0]}, [0.0], threshold=self._dynamic())
        x0 = solver_step(sample, sample, program, 0)
        assert isinstance(x0, Tensor)
        return x0

    @staticmethod
    def _promoted(sample: Tensor, model_output: Tensor) -> Tensor:
        """`sample` in the dtype that arithmetic of both has in diffusers."""
        if sample.dtype == model_output.dtype:
            return sample
        return sample.to(torch.promote_types(sample.dtype, model_output.dtype))

    def _advance(
        self,
        program: StepProgram,
        row: int,
        model_output: Tensor,
        sample: Tensor,
        slots: Sequence[Tensor] | None = None,
        **source: Any,
    ) -> Tensor:
        """x' of one row, in sample's dtype and memory format; arithmetic in float32 whatever the dtypes are.

        The slots that the row writes are tensors of their own. Gradients flow through them as through x'.
        """
        if slots and gradients.wanted(sample, model_output, *slots):
            written = gradients.remembered(program, row, model_output, sample, slots)
            x_next = solver_step(sample, model_output, program, row, slots=[slot.detach() for slot in slots], **source)
            assert isinstance(x_next, Tensor)
            x_next = gradients.through_history(x_next, program, row, slots)
            for k, value in written.items():
                slots[k].copy_(value)
            return x_next
        x_next = solver_step(sample, model_output, program, row, slots=slots, **source)
        assert isinstance(x_next, Tensor)
        return x_next

    def _noise_source(self, model_output: Tensor, sample: Tensor, generator: Generators) -> dict[str, Any]:
        """Noise as diffusers' randn_tensor draws it: of the sample's shape, contiguous, in model_output's dtype."""
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        if model_output.shape == sample.shape and model_output.is_contiguous():
            return noise_source(self.noise, model_output, generator)
        like = torch.empty(sample.shape, dtype=model_output.dtype, device=model_output.device)
        return noise_source(self.noise, like, generator)

    # Training's side: x_t and v at timesteps of the process.

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, of both tensors' shape and promoted dtype; arithmetic in float32, float64 tables.

        timesteps: integers (N,), or one for all. Raises ValueError for others, and for one outside [0, T) (on a GPU:
        NaN).
        """
        return self._marginal(original_samples, noise, timesteps, 1)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t·ε − √(1−ᾱ_t)·x0 (Salimans & Ho 2022, arXiv 2202.00512); arguments as `add_noise`'s."""
        return self._marginal(noise, sample, timesteps, -1)

    def _marginal(self, first: Tensor, second: Tensor, timesteps: Tensor, sign: int) -> Tensor:
        """√ᾱ_t·first + sign·√(1−ᾱ_t)·second."""
        if first.shape != second.shape:
            first, second = torch.broadcast_tensors(first, second)
        first = self._promoted(first, second)
        key = (first.device, sign)
        if key not in self._tables:
            tables = (np.sqrt(self._abar), sign * np.sqrt(1.0 - self._abar))
            self._tables[key] = tuple(torch.tensor(table, device=first.device) for table in tables)  # type: ignore[assignment]
        mixed = q_sample(first, _indices(timesteps, first), *self._tables[key], noise=second)
        assert isinstance(mixed, Tensor)
        return mixed


def _indices(timesteps: Tensor, like: Tensor) -> Tensor:
    """Timesteps as int64 (N,) on like's device; ValueError for fractions and for another number of them."""
    if timesteps.is_floating_point() or timesteps.numel() not in (1, len(like)):
        raise ValueError(
            f"timesteps are {timesteps.dtype} of shape {tuple(timesteps.shape)}; "
            f"they must be integers, one for each of {len(like)} samples or one for all"
        )
    return timesteps.to(like.device, torch.int64).flatten().expand(len(like)).contiguous()


def _version(tensor: Tensor) -> int:
    """How often somebody wrote to it; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
