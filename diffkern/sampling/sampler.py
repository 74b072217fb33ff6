"""Sampler: images from a model, a process and a solver."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from diffkern import solvers
from diffkern.ops import philox_normal, q_sample
from diffkern.process import GaussianProcess
from diffkern.sampling import eager
from diffkern.sampling.network import Model, Network, evaluating, placement
from diffkern.solvers import StepProgram

X_T_STREAM = 1  # of the noise source; the solver's own noise is `solver_step`'s default, stream 2

Labels = Tensor | Sequence[int]
Start = tuple[Tensor, int]


class Sampler:
    """Draws images of `shape` (C, H, W) from `model` by running `process` backwards.

    `model(x, t)`, or `model(x, t, y)` with labels, takes x (N, C, H, W), t int64 (N,) in the timesteps of the
    original process, y int64 (N,), and returns (N, C, H, W), or 2C channels where the process learns its variance. It
    is called in eval mode without gradients; x has the dtype of its weights, and its memory format.

    - `solver`: "ddpm", "ddim" or "dpmpp_2m" (DPM-Solver++(2M)); `steps`: how many of the process's T steps are made,
      an int, "ddimN" or sections (`process.space_timesteps`), None for all; `eta` in [0, 1]: DDIM's noise; `clip`: the
      range that x0 is held in, or None.
    - `guidance_scale` w: classifier-free guidance, u + w·(c − u) of the outputs without and with the label (Ho &
      Salimans 2022, arXiv 2207.12598, with w there one less). It doubles the model's batch, [uncond; cond]; 1 is the
      plain conditional output and does not. `null_label` is the label that means none: `model.num_classes` unless
      it is given.
    - `engine`: "eager".

    All noise is a function of the seed and the image's number: image i of a seed is the same whatever `n` and
    `batch_size` are, up to the model's own rounding.

    Raises ValueError naming the argument that cannot be.
    """

    def __init__(
        self,
        model: Model,
        process: GaussianProcess,
        shape: Sequence[int],
        *,
        solver: str = "ddim",
        steps: int | str | Iterable[int] | None = 50,
        guidance_scale: float | None = None,
        clip: tuple[float, float] | None = (-1.0, 1.0),
        engine: str = "eager",
        eta: float = 0.0,
        null_label: int | None = None,
    ) -> None:
        if len(shape) != 3 or any(size < 0 for size in shape):
            raise ValueError(f"shape is {tuple(shape)}; it must be (C, H, W)")
        if engine != "eager":
            raise ValueError(f"engine is {engine!r}; it may be 'eager'")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite, or None")
        self.model = model
        self.process = process
        self.shape = tuple(int(size) for size in shape)
        self.guidance_scale = None if guidance_scale == 1 else guidance_scale
        self._num_classes: int | None = getattr(model, "num_classes", None)
        self._given_null_label = null_label
        self._null_label = None
        if self.guidance_scale is not None:
            self._null_label = self._num_classes if null_label is None else null_label
            if self._null_label is None:
                raise ValueError("null_label must be given: guidance_scale needs it, and the model has no num_classes")
        self._solver = solver
        self._clip = clip
        self._eta = eta
        self._timesteps = process.spaced(steps)
        self.program = self._build(self._timesteps)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        labels: Labels | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        start: Start | None = None,
    ) -> Tensor:
        """n images, float32 (n, C, H, W), on the model's device.

        `labels` are n integers below the model's number of classes; `batch_size` images are made at once (None: all);
        `progress` shows a bar. `start` = (x_t, t) begins from x_t (n, C, H, W) at timestep t of the process instead
        of from noise (see :meth:`noise_to`): the solver then makes a step from t and those of its steps below t.

        Raises ValueError naming the argument that cannot be.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None")
        batch = batch_size or max(n, 1)
        program, x_start, checked_labels = self._check_run(n, labels, start)
        place = placement(self.model)
        images = torch.empty((n, *self.shape), device=place.device, memory_format=place.memory_format)
        firsts = range(0, n, batch)
        with evaluating(self.model), _bar(progress, len(firsts) * program.num_rows) as advance:
            for first in firsts:
                numbers = slice(first, min(first + batch, n))
                x, network = self._begin(program, numbers, seed, x_start, checked_labels)
                steps = eager.run(network, program, x, seed, first, self.guidance_scale, keep_states=False)
                for _, _, _, x in steps:  # noqa: B007 (the last one counts)
                    advance()
                images[numbers] = x
        return images

    def sample_progressive(
        self, n: int, *, seed: int = 0, labels: Labels | None = None, start: Start | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (row, x, x0) after each of the solver's steps; the last x is what :meth:`sample` returns.

        x is the state that the step led to, x0 the image that the model saw in the state before it, both float32
        (n, C, H, W) and the caller's to keep. The model is in eval mode until the generator ends or is closed.
        """
        program, x_start, checked_labels = self._check_run(n, labels, start)
        return self._progress(program, n, seed, x_start, checked_labels)

    @torch.no_grad()
    def _progress(
        self, program: StepProgram, n: int, seed: int, x_start: Tensor | None, labels: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        show = program.x0_program()
        with evaluating(self.model):
            x, network = self._begin(program, slice(0, n), seed, x_start, labels)
            steps = eager.run(network, program, x, seed, 0, self.guidance_scale, keep_states=True)
            for row, before, output, after in steps:
                yield row, after, eager.predicted_x0(before, output, show, row, self.guidance_scale)

    @torch.no_grad()
    def noise_to(self, x0: Tensor, t: int, *, seed: int = 0) -> Tensor:
        """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, float32, for images x0 (n, C, H, W) in [−1, 1] and t in [0, T) of the process.

        ε is the noise that :meth:`sample` with this seed would begin from: at t = T−1 the two nearly meet.
        """
        self._check_timestep(t)
        self._check_images("x0", x0)
        place = placement(self.model)
        tables = self.process.tables(place.device)
        x_t = q_sample(
            x0.to(place.device, torch.float32),
            torch.full((len(x0),), t, device=place.device),
            tables.sqrt_alphas_cumprod,
            tables.sqrt_one_minus_alphas_cumprod,
            seed=seed,
            stream=X_T_STREAM,
        )
        assert isinstance(x_t, Tensor)  # a pair only if the noise is asked for
        return x_t

    def _build(self, timesteps: Sequence[int]) -> StepProgram:
        return solvers.build(self._solver, self.process.keep(timesteps), clip=self._clip, eta=self._eta)

    def _begin(
        self, program: StepProgram, numbers: slice, seed: int, x_start: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Network]:
        """The first x (N, C, H, W) and the model calls of the images `numbers`."""
        place = placement(self.model)
        n = numbers.stop - numbers.start
        if x_start is None:
            x = philox_normal(
                (n, *self.shape),
                seed,
                samples=numbers.start,
                stream=X_T_STREAM,
                device=place.device,
                memory_format=place.memory_format,
            )
        else:
            x = x_start[numbers].to(place.device, torch.float32).contiguous(memory_format=place.memory_format)
        times = torch.tensor(program.times.astype(np.int64), device=place.device)
        y = None if labels is None else labels[numbers].to(place.device)
        return x, Network(self.model, times, n, place.dtype, y, self._null_label)

    def _check_run(
        self, n: int, labels: Labels | None, start: Start | None
    ) -> tuple[StepProgram, Tensor | None, Tensor | None]:
        if n < 0:
            raise ValueError(f"n is {n}; it must be at least 0")
        checked_labels = self._check_labels(n, labels)
        if start is None:
            return self.program, None, checked_labels
        x_t, t = start
        self._check_timestep(t)
        self._check_images("start[0]", x_t)
        if len(x_t) != n:
            raise ValueError(f"start[0] holds {len(x_t)} images; n is {n}")
        return self._build([*(kept for kept in self._timesteps if kept < t), t]), x_t, checked_labels

    def _check_labels(self, n: int, labels: Labels | None) -> Tensor | None:
        if labels is None:
            if self._num_classes is not None or self.guidance_scale is not None:
                raise ValueError("labels must be given: the model is conditional on a class")
            return None
        if self._num_classes is None and hasattr(self.model, "num_classes"):
            raise ValueError("labels must be None: the model has no classes (its num_classes is None)")
        y = torch.as_tensor(labels)
        if y.shape != (n,) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"labels are {y.dtype} of shape {tuple(y.shape)}; they must be integers of shape ({n},)")
        y = y.to(torch.int64)
        allowed = y >= 0
        if self._num_classes is not None:
            allowed &= (y < self._num_classes) | (y == self._given_null_label)
        if not allowed.all():
            limit = "0 or more" if self._num_classes is None else f"in [0, {self._num_classes})"
            raise ValueError(f"labels must be {limit}; one is {int(y[~allowed][0])}")
        return y

    def _check_timestep(self, t: int) -> None:
        if not isinstance(t, int) or not 0 <= t < self.process.num_timesteps:
            raise ValueError(f"t is {t!r}; it must be an int in [0, {self.process.num_timesteps})")

    def _check_images(self, name: str, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape or not images.is_floating_point():
            raise ValueError(
                f"{name} is {images.dtype} of shape {tuple(images.shape)}; "
                f"it must be floating point of shape (n, {', '.join(map(str, self.shape))})"
            )


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], object]]:
    """A function that advances a progress bar of `total` steps by one."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="step") as bar:
        yield bar.update
