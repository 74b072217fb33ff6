"""Sampler: images from a model, a process and a solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern import solvers
from diffkern.ops import q_sample
from diffkern.process.spacing import Steps, whole
from diffkern.sampling.arguments import Labels, check_images, check_labels, check_timestep
from diffkern.sampling.network import Model, placement
from diffkern.sampling.run import X_T_STREAM, Run
from diffkern.solvers import StepProgram
from diffkern.solvers.transitions import Process

Start = tuple[Tensor, int]
Pair = tuple[float, float]


class Sampler:
    """Draws images of `shape` (C, H, W) from `model` by running `process` backwards.

    `model(x, t)`, or `model(x, t, y)` with labels, takes x (N, C, H, W), t (N,) in the timesteps of the original
    process (int64, or float32 where any of the run's is fractional), y int64 (N,), and returns (N, C, H, W), or 2C
    channels where the process learns its variance. It is called in eval mode without gradients; x has the dtype of its
    weights, and its memory format. A model whose attribute `self_condition` is true is also given `x_self_cond=`, the
    x0 in [−1, 1] that its call before led to, at first zeros (Chen et al. 2022, arXiv 2208.04202).

    - `solver`: one of `solvers.SOLVERS`; `eta` and further keywords are its options (docs/solvers.md), such as `order`.
    - `steps`: how many of the process's T steps are made, an int, "ddimN" or sections, None for all; `spacing`:
      "respaced", "leading" (with `steps_offset`), "trailing" or "linspace" (`process.space_timesteps`). `sigmas` spaces
      σ/α instead: "linear", "karras", "exponential", "polyexponential", "beta" or "lu" (`process.space_sigmas`).
    - `clip`: the range that x0 is held in, or None; `threshold`: (ratio, max) of dynamic thresholding in its place.
    - `guidance_scale` w: classifier-free guidance, u + w·(c − u) of the outputs without and with the label (Ho &
      Salimans 2022, arXiv 2207.12598, with w there one less). It doubles the model's batch, [uncond; cond]; 1 is the
      plain conditional output and does not. `null_label` is the label that means none: `model.num_classes` unless
      it is given. `guidance_rescale` φ in [0, 1] takes the result's standard deviation back towards that of the
      conditional output (Lin et al. 2023, arXiv 2305.08891, eqs. 15 and 16).
    - `cond_fn(x, t)`, or `cond_fn(x, t, y)` with labels: classifier guidance, the gradient at x of log p(y | x), times
      whatever scale, in x's shape (Dhariwal & Nichol 2021, arXiv 2105.05233), for solvers that take it. x is float32
      (N, C, H, W), t as the model has it. It is called without gradients: `torch.enable_grad()` is its own business.
    - `engine`: "eager".

    All noise is a function of the seed and the image's number: image i of a seed is the same whatever `n` and
    `batch_size` are, up to the model's own rounding.

    Raises ValueError naming the argument that cannot be.
    """

    def __init__(
        self,
        model: Model,
        process: Process,
        shape: Sequence[int],
        *,
        solver: str = "ddim",
        steps: Steps | None = 50,
        spacing: str = "respaced",
        steps_offset: int = 0,
        sigmas: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        clip: Pair | None = (-1.0, 1.0),
        threshold: Pair | None = None,
        engine: str = "eager",
        eta: float | None = None,
        null_label: int | None = None,
        **options: Any,
    ) -> None:
        if len(shape) != 3 or any(size != int(size) or size < 0 for size in shape):
            raise ValueError(f"shape is {tuple(shape)}; it must be (C, H, W), whole numbers")
        if engine != "eager":
            raise ValueError(f"engine is {engine!r}; it may be 'eager'")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite, or None")
        self.model = model
        self.process = process
        self.shape = tuple(int(size) for size in shape)
        self.guidance_scale = None if guidance_scale == 1 else guidance_scale
        if guidance_rescale is not None and not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {guidance_rescale}; it must be in [0, 1], or None")
        if guidance_rescale and guidance_scale is None:
            raise ValueError(f"guidance_rescale is {guidance_rescale}; it needs a guidance_scale")
        self.guidance_rescale = None if self.guidance_scale is None else guidance_rescale
        self.cond_fn = cond_fn
        self._num_classes: int | None = getattr(model, "num_classes", None)
        self._given_null_label = None if null_label is None else whole(null_label, "null_label")
        self._null_label = None
        if self.guidance_scale is not None:
            self._null_label = self._num_classes if null_label is None else null_label
            if self._null_label is None:
                raise ValueError("null_label must be given: guidance_scale needs it, and the model has no num_classes")
        self._grid: dict[str, Any] = {"spacing": spacing, "steps_offset": steps_offset, "sigmas": sigmas}
        # Sections may come as an iterator, and are asked for at every start.
        self._steps = list(steps) if isinstance(steps, Iterable) and not isinstance(steps, str) else steps
        self._solver = solver
        self._options = {"clip": clip, "threshold": threshold, "eta": eta, **options}
        self.program = self._build()

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

        Raises ValueError naming the argument that cannot be, and TypeError for a model or a cond_fn that returns no
        tensor.
        """
        return self._run(n, labels, start, seed).images(batch_size, progress)

    def sample_progressive(
        self, n: int, *, seed: int = 0, labels: Labels | None = None, start: Start | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (row, x, x0) after each row of the solver's program; the last x is what :meth:`sample` returns.

        x is the state that the row led to, x0 the image that the model saw in the state before it, both float32
        (n, C, H, W) and the caller's to keep. Rows that call no model (noise before the first step) are not shown. The
        model is in eval mode until the generator ends or is closed.
        """
        return self._states(self._run(n, labels, start, seed))

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        *,
        labels: Labels | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Start:
        """(x_T, t) from which :meth:`sample` with `start=(x_T, t)` comes back to `images` (n, C, H, W) in [−1, 1].

        DDIM inversion (`solvers.ddim_inverse`) over the sampler's own steps, with its guidance_scale, and without
        clipping: x_T is float32 (n, C, H, W) at the first of them, timestep t. Of first order in the step: DDIM with
        η = 0 and other solvers of the ODE come back the nearer the more steps there are.

        Raises ValueError naming the argument that cannot be, and with a cond_fn.
        """
        check_images("images", images, self.shape)
        if self.cond_fn is not None:
            raise ValueError("cond_fn must be None: a classifier's gradient is not inverted")
        levels = solvers.grid(self.process, self._steps, **self._grid)
        n = len(images)
        program = solvers.ddim_inverse(levels, variance=solvers.channels_of(self.process))
        x_T = self._of(program, n, 0, images, self._check_labels(n, labels)).images(batch_size, progress)
        last = self.process.num_timesteps - 1
        if self._grid["sigmas"] is None:
            spaced = (self._grid[name] for name in ("spacing", "steps_offset"))
            last = self.process.spaced(self._steps, *spaced)[-1]
        return x_T, last

    @torch.no_grad()
    def noise_to(self, x0: Tensor, t: int, *, seed: int = 0) -> Tensor:
        """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, float32, for images x0 (n, C, H, W) in [−1, 1] and t in [0, T) of the process.

        (1−s)·x0 + s·ε in a FlowProcess. ε is the noise that :meth:`sample` with this seed would begin from: at t = T−1
        the two nearly meet.
        """
        check_timestep(t, self.process.num_timesteps)
        check_images("x0", x0, self.shape)
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

    def _build(self, start: int | None = None) -> StepProgram:
        return solvers.build(
            self._solver,
            self.process,
            self._steps,
            start=start,
            classifier=self.cond_fn is not None,
            **self._grid,
            **self._options,
        )

    def _run(self, n: int, labels: Labels | None, start: Start | None, seed: int) -> Run:
        """The run that these arguments ask for, once they are checked."""
        if n < 0:
            raise ValueError(f"n is {n}; it must be at least 0")
        checked_labels = self._check_labels(n, labels)
        if start is None:
            return self._of(self.program, n, seed, None, checked_labels)
        x_t, t = start
        check_timestep(t, self.process.num_timesteps)
        check_images("start[0]", x_t, self.shape)
        if len(x_t) != n:
            raise ValueError(f"start[0] holds {len(x_t)} images; n is {n}")
        return self._of(self._build(t), n, seed, x_t, checked_labels)

    def _of(self, program: StepProgram, n: int, seed: int, x_start: Tensor | None, labels: Tensor | None) -> Run:
        return Run(
            self.model,
            program,
            self.shape,
            n,
            seed,
            x_start,
            labels,
            self._null_label,
            self.guidance_scale,
            self.guidance_rescale,
            self.cond_fn,
        )

    @torch.no_grad()
    def _states(self, run: Run) -> Iterator[tuple[int, Tensor, Tensor]]:
        # Here for no_grad, which of a generator guards what it does, and not what is done between two of its values.
        yield from run.states()

    def _check_labels(self, n: int, labels: Labels | None) -> Tensor | None:
        if labels is None:
            if self._num_classes is not None or self.guidance_scale is not None:
                raise ValueError("labels must be given: the model is conditional on a class")
            return None
        if self._num_classes is None and hasattr(self.model, "num_classes"):
            raise ValueError("labels must be None: the model has no classes (its num_classes is None)")
        return check_labels(labels, n, self._num_classes, self._given_null_label)
