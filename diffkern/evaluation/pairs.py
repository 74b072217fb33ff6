"""Every (image, timestep) pair of an evaluation, in batches, with what is done kept on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkern.evaluation.images import EvaluationImages
from diffkern.evaluation.store import Arrays, Store
from diffkern.ops import q_sample
from diffkern.process import GaussianProcess
from diffkern.sampling.arguments import check_tensor
from diffkern.sampling.network import Model, evaluating, network_times, placement

# Writing takes no more than this part of the time.
_SAVING_SHARE = 0.05

# One batch: x0, t, x_t, the network's output in float32, and what the noise was made with. To tensors (n,).
PairTerms = Callable[[Tensor, Tensor, Tensor, Tensor, Mapping[str, Any]], Sequence[Tensor]]


class PairLoop:
    """Calls the network on every image at every timestep and collects what `terms` makes of it.

    Pair p is timestep p mod T of image p div T; a batch is `batch_size` of them, so that it may hold many timesteps of
    few images. The noise of pair p is that of `seed` at draw k, sample p, `stream`: it depends on no batching. With
    several `draws` the terms are their mean.
    """

    def __init__(
        self,
        model: Model,
        process: GaussianProcess,
        images: EvaluationImages,
        *,
        seed: int,
        stream: int,
        draws: int,
        batch_size: int,
    ) -> None:
        if not isinstance(process, GaussianProcess):
            raise TypeError(f"process is a {type(process).__name__}; it must be a GaussianProcess, which has a bound")
        for name, value in (("draws", draws), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.model, self.images, self.num_timesteps = model, images, process.num_timesteps
        self.seed, self.stream, self.draws, self.batch_size = seed, stream, draws, batch_size
        self.place = placement(model)
        self.tables = process.tables(self.place.device)
        self.times = network_times(process.timestep_map, self.place.device)
        self.total = len(images) * self.num_timesteps

    @torch.no_grad()
    def run(
        self, terms: PairTerms, names: Sequence[str], store: Store | None, save_every: float, progress: bool
    ) -> Arrays:
        """What `terms` returns under `names`, each float32 (N, T), from where `store` stands.

        Saved every `save_every` seconds, at the end, and when an exception ends it.

        Raises:
            FloatingPointError: a term is NaN or infinite; names the image and the timestep.
            KeyboardInterrupt: Ctrl-C; says what was kept.
        """
        arrays = {name: np.full(self.total, np.nan, np.float32) for name in names}
        done = 0
        if store is not None and store.found is not None:
            done, found = store.found
            for name in names:
                arrays[name][:] = found[name].reshape(-1)
        shaped = {name: array.reshape(len(self.images), self.num_timesteps) for name, array in arrays.items()}
        saved, saved_at, pause = done, time.monotonic(), save_every
        try:
            with evaluating(self.model), _bar(progress, self.total, done) as advance:
                while done < self.total:
                    last = min(done + self.batch_size, self.total)
                    self._batch(terms, done, last, [arrays[name] for name in names])
                    advance(last - done)
                    done = last
                    if store is not None and time.monotonic() - saved_at >= pause:
                        begin = time.monotonic()
                        store.save(done, shaped)
                        saved, saved_at = done, time.monotonic()
                        pause = max(save_every, (saved_at - begin) / _SAVING_SHARE)
        except KeyboardInterrupt:
            where = f"kept in {store.path}" if store and done else "nothing was kept"
            raise KeyboardInterrupt(f"interrupted after {done:,} of {self.total:,} terms; {where}") from None
        finally:
            if store is not None and saved < done:
                store.save(done, shaped)
        return shaped

    def _batch(self, terms: PairTerms, first: int, last: int, into: Sequence[np.ndarray]) -> None:
        device, memory_format = self.place.device, self.place.memory_format
        pairs = torch.arange(first, last, device=device)
        first_image = first // self.num_timesteps
        images, labels = self.images.slice(first_image, (last - 1) // self.num_timesteps + 1)
        which, t = pairs // self.num_timesteps - first_image, pairs % self.num_timesteps
        x0 = images.to(device)[which].contiguous(memory_format=memory_format)
        y = () if labels is None else (labels.to(device)[which],)
        sums: list[Tensor] = []
        for draw in range(self.draws):
            noise: dict[str, Any] = {"seed": self.seed, "draw": draw, "samples": first, "stream": self.stream}
            tables = self.tables
            x_t = q_sample(x0, t, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, **noise)
            assert isinstance(x_t, Tensor)  # a pair only if the noise is asked for
            output = self.model(x_t.to(self.place.dtype), self.times[t], *y)
            check_tensor("model", output)
            values = [value.double() for value in terms(x0, t, x_t, output.float(), noise)]
            sums = [total + value for total, value in zip(sums, values, strict=True)] if sums else values
        for array, total in zip(into, sums, strict=True):
            mean = (total / self.draws).float().cpu().numpy()
            wrong = np.flatnonzero(~np.isfinite(mean))
            if wrong.size:
                image, timestep = divmod(first + int(wrong[0]), self.num_timesteps)
                raise FloatingPointError(
                    f"the model's output for image {image} at timestep {timestep} has no finite term"
                )
            array[first:last] = mean


def describe_evaluation(
    model: Model, process: GaussianProcess, images: EvaluationImages, **settings: object
) -> dict[str, Any]:
    """All that decides the result, as JSON values: the settings, and digests of weights, process and data.

    A model that is no module has no weights to look at: its type's name stands for it.
    """
    weights = model.state_dict() if isinstance(model, nn.Module) else {}
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    tables = [process.betas, process.timestep_map.astype(np.float64)]
    if process.eps_mean_square is not None:
        tables.append(process.eps_mean_square)
    return {
        "images": len(images),
        "num_timesteps": process.num_timesteps,
        "prediction": process.prediction,
        "variance": process.variance,
        **settings,
        "weights_sha256": digest.hexdigest(),
        "data_sha256": images.digest,
        "process_sha256": hashlib.sha256(b"".join(table.tobytes() for table in tables)).hexdigest(),
    }


@contextlib.contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[int], object]]:
    """A function that advances a progress bar of `total` terms, `done` of them from earlier."""
    if not shown:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, unit="term", unit_scale=True) as bar:
        yield bar.update
