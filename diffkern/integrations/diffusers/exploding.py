"""Schedulers that keep the state as x0 + σ̂·ε, whose variance explodes, and scale it for the network."""

from __future__ import annotations

import numpy as np
from diffusers.utils import logging
from torch import Tensor

from diffkern.integrations.diffusers.sigmas import SigmaScheduler

logger = logging.get_logger(__name__)


class ExplodingScheduler(SigmaScheduler):
    """σ̂ = √((1−ᾱ)/ᾱ); the network, trained on √ᾱ·x0 + √(1−ᾱ)·ε, sees the state divided by √(σ̂² + 1)."""

    def _set_up(self, noise: str) -> None:
        super()._set_up(noise)
        self.is_scale_input_called = False
        if getattr(self.config, "rescale_betas_zero_snr", False):
            # σ̂ is not to be infinite where ᾱ is 0: diffusers takes the least number that float16 has.
            abar = self._abar.copy()
            abar[-1] = 2.0**-24
            self._use_alphas_cumprod(abar)

    @property
    def init_noise_sigma(self) -> Tensor:
        """By what unit normals are multiplied to be the first state, float32 (): σ̂_max, or √(σ̂_max² + 1)."""
        largest = self.sigmas.max()
        return largest if self.config.timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:  # type: ignore[override]
        """sample/√(σ̂² + 1): what the network is to be given at this step, of sample's dtype and memory format."""
        index = self._index(timestep)
        self.is_scale_input_called = True
        return sample / float(np.sqrt(self._levels[index] ** 2 + 1))

    def _check_step(self, timestep: float | Tensor) -> None:
        """Steps count by timesteps, which are floats: an integer is likely somebody's loop counter."""
        whole = isinstance(timestep, Tensor) and not timestep.is_floating_point()
        if whole or isinstance(timestep, int | np.integer):
            raise ValueError(
                f"timestep is {timestep}, an integer; {type(self).__name__} must be given one of its `timesteps`, "
                "not their index"
            )
        if not self.is_scale_input_called:
            logger.warning(
                "%s.step was called without scale_model_input: the network saw a state that it was not trained on",
                type(self).__name__,
            )
