"""The losses that train a network: squared error, the variational bound, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.integrations.guided_diffusion import one_pass
from diffkern.integrations.guided_diffusion.bound import METHODS, Bound, as_tensor
from diffkern.integrations.guided_diffusion.distributions import Kwargs, Model, at_least_float32
from diffkern.integrations.guided_diffusion.hooks import overridden
from diffkern.integrations.guided_diffusion.nn import mean_flat
from diffkern.integrations.guided_diffusion.types import LossType, ModelMeanType, check_loss_type


class Training(Bound):
    """The losses of :class:`GaussianDiffusion`."""

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`loss` (N,) of the network at x_t ~ q(x_t | x_start), and the terms that it is the sum of, (N,) each.

        MSE: `mse`, the squared error of the mean's channels; with a learned variance also `vb`, the bound's term in
        bits/dim, whose gradient reaches the variance's channels alone (Nichol & Dhariwal 2021, arXiv 2102.09672,
        section 3.1). RESCALED_MSE: vb·T/1000. KL: the bound's term, RESCALED_KL: T times it, both with a gradient by
        all channels and without `mse` and `vb`. x0 is not clipped in the bound.

        x_start is (N, C, …) in [−1, 1], t int64 (N,), 0-based; `noise`, of x_start's shape, is drawn if not given.
        Results are float32 (float64 for float64). Raises ValueError or TypeError naming the argument; a t out of range
        raises ValueError on a CPU and gives NaN for that sample elsewhere.
        """
        check_loss_type(self.loss_type)
        t = self._checked(t, x_start)
        whole = not overridden(self, METHODS) and one_pass.possible(self, x_start, noise)
        x_t, source = self._noised(x_start, t, noise, whole)
        if self.loss_type.is_vb():
            if whole:
                output = self._output(model, x_t, t, model_kwargs)
                term = one_pass.bound_term(self, output, x_start, x_t, t, False, self._term_of(x_start, x_t, t, False))
            else:
                found = self._vb_terms_bpd(
                    model, x_start=x_start, x_t=x_t, t=t, clip_denoised=False, model_kwargs=model_kwargs
                )
                term = found["output"]
            return {"loss": term * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else term}
        output = self._output(model, x_t, t, model_kwargs)

        def squared_error(output: Tensor) -> tuple[Tensor, ...]:
            return self._squared_error(output, x_start, x_t, t, as_tensor(source, x_start))

        terms = (
            one_pass.squared_error(self, output, x_start, t, source, squared_error) if whole else squared_error(output)
        )
        if not self._learns_variance:
            return {"mse": terms[0], "loss": terms[0]}
        mse, vb = terms
        if self.loss_type == LossType.RESCALED_MSE:
            vb = vb * (self.num_timesteps / 1000.0)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    def _squared_error(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """(mse,) of a network's output, or with a learned variance (mse, vb)."""
        mean, bound = output, []
        if self._learns_variance:
            mean, variance = output.split(x_start.shape[1], dim=1)
            held = torch.cat([mean.detach(), variance], dim=1)
            found = self._vb_terms_bpd(lambda *args, **kwargs: held, x_start=x_start, x_t=x_t, t=t, clip_denoised=False)
            bound.append(found["output"])
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        else:
            target = x_start if self.model_mean_type == ModelMeanType.START_X else noise
        return mean_flat((at_least_float32(target) - mean) ** 2), *bound
