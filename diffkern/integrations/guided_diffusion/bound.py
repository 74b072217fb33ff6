"""The variational bound on −log p(x0) in bits/dim: its terms, the prior's, and all of them added up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.integrations.draws import noise_source
from diffkern.integrations.guided_diffusion import one_pass
from diffkern.integrations.guided_diffusion.distributions import Distributions, Kwargs, Model, at_least_float32
from diffkern.integrations.guided_diffusion.hooks import methods_of, overridden
from diffkern.integrations.guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from diffkern.integrations.guided_diffusion.nn import mean_flat

# What a subclass may have its own of; a term is then made of these methods and not in one pass.
_OF_A_TERM = methods_of(
    Distributions,
    "p_mean_variance",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
)


class Bound(Distributions):
    """The likelihood of :class:`GaussianDiffusion` (Ho et al. 2020, arXiv 2006.11239, eq. 5).

    Images are (N, C, …) in [−1, 1], of 256 grey levels where t = 0 asks for their probability. Everything returned is
    float32 (float64 for float64) and, per sample, a mean over C·H·W divided by ln 2: bits/dim.
    """

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """`output` (N,), the bound's term at each sample's t, and `pred_xstart`, of x_t's shape.

        The term is KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) and, where t = 0, −log p(x_0 | x_1) of the discretised
        decoder (`losses.discretized_gaussian_log_likelihood`). Both results are differentiable. Raises ValueError or
        TypeError naming the argument; a t out of range raises ValueError on a CPU and gives NaN elsewhere.
        """
        t = self._checked(t, x_t)
        if overridden(self, _OF_A_TERM) or not one_pass.possible(self, x_start, x_t):
            said = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            return {"output": self._term(said, x_start, x_t, t), "pred_xstart": said["pred_xstart"]}
        clip = bool(clip_denoised)
        output = self._output(model, x_t, t, model_kwargs)
        return {
            "output": one_pass.bound_term(self, output, x_start, x_t, t, clip, self._term_of(x_start, x_t, t, clip)),
            "pred_xstart": one_pass.xstart(self, output, x_t, t, clip),
        }

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ N(0, 1)), (N,): the part of the bound that no network changes."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, dtype=torch.int64, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """The whole bound at x_start, with one draw of x_t for each t, without gradients.

        `total_bpd` (N,) is the sum of `prior_bpd` (N,) and of the terms `vb` (N, T). `xstart_mse` (N, T) is the squared
        error of `pred_xstart`, `mse` (N, T) that of the ε which `pred_xstart` makes of x_t. Column j is t = T−1−j, the
        order in which noise is drawn and the network asked.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        with torch.no_grad():
            for i in reversed(range(self.num_timesteps)):
                t = torch.full((len(x_start),), i, dtype=torch.int64, device=x_start.device)
                for name, value in self._terms_at(model, x_start, t, clip_denoised, model_kwargs).items():
                    columns[name].append(value)
            found = {name: torch.stack(values, dim=1) for name, values in columns.items()}
            prior = self._prior_bpd(x_start)
            return {"total_bpd": found["vb"].sum(dim=1) + prior, "prior_bpd": prior, **found}

    def _terms_at(
        self, model: Model, x_start: Tensor, t: Tensor, clip_denoised: bool, model_kwargs: Kwargs
    ) -> dict[str, Tensor]:
        """`vb`, `xstart_mse` and `mse` (N,) at t, of a draw of x_t."""
        whole = not overridden(self, METHODS) and one_pass.possible(self, x_start)
        x_t, source = self._noised(x_start, t, None, whole)
        if whole:
            output = self._output(model, x_t, t, model_kwargs)
            return one_pass.bound_terms(self, output, x_start, x_t, t, bool(clip_denoised))
        found = self._vb_terms_bpd(
            model, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        x0 = found["pred_xstart"]
        eps = self._predict_eps_from_xstart(x_t, t, x0)
        return {
            "vb": found["output"],
            "xstart_mse": mean_flat((x0 - x_start) ** 2),
            "mse": mean_flat((eps - as_tensor(source, x_start)) ** 2),
        }

    def _term(self, said: dict[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term of what `p_mean_variance` said."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        divergence = normal_kl(mean, log_variance, said["mean"], said["log_variance"])
        log_likelihood = discretized_gaussian_log_likelihood(
            at_least_float32(x_start), means=said["mean"], log_scales=0.5 * said["log_variance"]
        )
        return torch.where(t == 0, -mean_flat(log_likelihood), mean_flat(divergence)) / math.log(2.0)

    def _term_of(self, x_start: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Callable[[Tensor], tuple[Tensor]]:
        """The bound's term as a function of the network's output."""
        return lambda output: (self._term(self._said_by(output, x_t, t, clip, None), x_start, x_t, t),)

    def _noised(self, x_start: Tensor, t: Tensor, noise: Tensor | None, whole: bool) -> tuple[Tensor, dict[str, Any]]:
        """x_t, and its noise as the ops take it: `noise`, else a draw. `whole`: no method has to be asked."""
        source = noise_source(self.noise, x_start) if noise is None else {"noise": noise}
        if not whole or "noise" in source:
            source = {"noise": as_tensor(source, x_start)}
            return self.q_sample(x_start, t, noise=source["noise"]), source
        tables = (
            self._tensor(f"sqrt_{name}", x_start.device) for name in ("alphas_cumprod", "one_minus_alphas_cumprod")
        )
        return ops.q_sample(at_least_float32(x_start), t, *tables, **source), source  # type: ignore[return-value]


def as_tensor(source: dict[str, Any], x_start: Tensor) -> Tensor:
    """The noise of `source` for x_start: its tensor, or the counter's numbers."""
    if "noise" in source:
        return source["noise"]
    like = at_least_float32(x_start)
    return ops.philox_normal(like.shape, **source, stream=3, dtype=like.dtype, device=like.device)


# What losses and bound are made of: with any of it overridden, they are made of these methods and not in one pass.
METHODS = {
    **_OF_A_TERM,
    **methods_of(Bound, "q_sample", "_predict_eps_from_xstart", "_vb_terms_bpd"),
}
