"""SpacedDiffusion: a diffusion of some of another's timesteps, whose network is still asked in the other's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffkern import process
from diffkern.integrations.guided_diffusion.gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: int | str | Iterable[int]) -> set[int]:
    """Which timesteps of [0, num_timesteps) to keep, as `process.space_timesteps` picks them.

    `section_counts` is a list of counts, one for each of as many equal sections, or those as a string "10,15,20";
    "ddimN" is N steps at one integer stride, ValueError where there is none.
    """
    return set(process.space_timesteps(num_timesteps, section_counts))


class SpacedDiffusion(GaussianDiffusion):
    """The diffusion that keeps the timesteps `use_timesteps` of the one with `betas`.

    ᾱ stays what it was at each of them. `timestep_map[i]` is the original timestep of i, `original_num_steps` how many
    there were; further arguments are those of :class:`GaussianDiffusion`. Networks and cond_fns are called with the
    original timestep, and with `rescale_timesteps` with that times 1000/original_num_steps, as a float.

    Raises ValueError for timesteps that `betas` does not have, and for none.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: ArrayLike, **kwargs: Any) -> None:
        original = process.GaussianProcess(betas)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = original.num_timesteps
        super().__init__(betas=original.keep(self.timestep_map).betas, **kwargs)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """t itself: the wrapped network scales it."""
        return t

    def _wrap_model(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if isinstance(model, _WrappedModel):
            return model
        maps = self._once("timestep_map", dict)
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps, maps)


class _WrappedModel:
    """`model(x, ts, …)` called with the original process's timesteps in the place of its own, ts (N,), int64."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
        maps: dict[torch.device, tuple[list[int], Tensor]] | None = None,
    ) -> None:
        """`maps` keeps the map as a tensor from one wrapper to the next."""
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self._maps = {} if maps is None else maps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        original = self._map(ts.device).index_select(0, ts)
        if self.rescale_timesteps:
            original = original.float() * (1000.0 / self.original_num_steps)
        return self.model(x, original, **kwargs)

    def _map(self, device: torch.device) -> Tensor:
        # The list is the user's to change, so it is compared.
        made_from, tensor = self._maps.get(device, (None, None))
        if tensor is None or made_from != self.timestep_map:
            tensor = torch.tensor(self.timestep_map, dtype=torch.int64, device=device)
            self._maps[device] = list(self.timestep_map), tensor
        return tensor
