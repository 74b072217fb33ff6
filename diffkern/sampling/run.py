"""One run: n images made by one program, whole or row by row."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.ops import philox_normal
from diffkern.sampling import eager
from diffkern.sampling.arguments import check_tensor
from diffkern.sampling.network import Model, Network, evaluating, network_times, placement
from diffkern.sampling.self_condition import SelfConditioned, self_conditioned
from diffkern.solvers import StepProgram

X_T_STREAM = 1  # of the noise source; the solver's own noise is `solver_step`'s default, stream 2


@dataclass(frozen=True)
class Run:
    """What the images of one call have in common.

    `shape` is (C, H, W); `x_start` (n, C, H, W) is where they begin, noise if it is None; `labels` are int64 (n,) or
    None. With `null_label` the model is called on the doubled batch [uncond; cond]. A model whose attribute
    `self_condition` is true is given the x0 of its call before, in [−1, 1].
    """

    model: Model
    program: StepProgram
    shape: tuple[int, ...]
    n: int
    seed: int
    x_start: Tensor | None
    labels: Tensor | None
    null_label: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    cond_fn: Callable[..., Tensor] | None

    @functools.cached_property
    def _executed(self) -> StepProgram | SelfConditioned:
        conditioned = getattr(self.model, "self_condition", False)
        return self_conditioned(self.program) if conditioned else self.program

    def images(self, batch_size: int | None, progress: bool) -> Tensor:
        """The last states, float32 (n, C, H, W), made `batch_size` at a time."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None")
        batch = batch_size or max(self.n, 1)
        place = placement(self.model)
        images = torch.empty((self.n, *self.shape), device=place.device, memory_format=place.memory_format)
        firsts = range(0, self.n, batch)
        with evaluating(self.model), _bar(progress, len(firsts) * self.program.num_rows) as advance:
            for first in firsts:
                numbers = slice(first, min(first + batch, self.n))
                steps, _ = self._steps(numbers, keep_states=False)
                for _, _, _, x in steps:  # noqa: B007 (the last one counts)
                    advance()
                images[numbers] = x
        return images

    def states(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, x after it, the x0 that the model saw before it) of the rows that call the model."""
        show = self.program.x0_program()
        with evaluating(self.model):
            steps, guidance = self._steps(slice(0, self.n), keep_states=True)
            for row, before, output, after in steps:
                if output is not None:
                    yield row, after, eager.predicted_x0(before, output, show, row, guidance)

    def _steps(
        self, numbers: slice, *, keep_states: bool
    ) -> tuple[Iterator[tuple[int, Tensor, Tensor | None, Tensor]], eager.Guidance]:
        """The rows of the images `numbers` as `eager.run` has them, and their guidance."""
        place = placement(self.model)
        n = numbers.stop - numbers.start
        times = network_times(self.program.times, place.device)
        y = None if self.labels is None else self.labels[numbers].to(place.device)
        network = Network(self.model, times, n, place.dtype, y, self.null_label)
        gradient = None if self.cond_fn is None else _gradient(self.cond_fn, times[:, None].repeat(1, n), y)
        guidance = eager.Guidance(self.guidance_scale, self.guidance_rescale, gradient)
        steps = eager.run(
            network,
            self._executed,
            self._first_state(numbers),
            self.seed,
            numbers.start,
            guidance,
            keep_states=keep_states,
        )
        return steps, guidance

    def _first_state(self, numbers: slice) -> Tensor:
        place = placement(self.model)
        if self.x_start is not None:
            return self.x_start[numbers].to(place.device, torch.float32).contiguous(memory_format=place.memory_format)
        return philox_normal(
            (numbers.stop - numbers.start, *self.shape),
            self.seed,
            samples=numbers.start,
            stream=X_T_STREAM,
            device=place.device,
            memory_format=place.memory_format,
        )


def _gradient(cond_fn: Callable[..., Tensor], times: Tensor, y: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    labels = () if y is None else (y,)

    def gradient(x: Tensor, row: int) -> Tensor:
        e = cond_fn(x, times[row], *labels)
        # None would be taken for a step without a classifier.
        check_tensor("cond_fn", e)
        return e

    return gradient


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], object]]:
    """A function that advances a progress bar of `total` steps by one."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="step") as bar:
        yield bar.update
