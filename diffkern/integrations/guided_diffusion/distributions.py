"""q and p: every distribution of the process and its reverse, as plain tensor code that any override can stand in for.

This is what the public methods return, and the road of every step that cannot be one fused pass: with a subclass's own
hooks, a `denoised_fn`, or a gradient to be taken through x0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.integrations.draws import noise_source
from diffkern.integrations.guided_diffusion.tables import Tables
from diffkern.integrations.guided_diffusion.types import ModelMeanType, ModelVarType, check_types

Model = Callable[..., Tensor]
DenoisedFn = Callable[[Tensor], Tensor] | None
Kwargs = Mapping[str, Any] | None

_LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class Distributions(Tables):
    """The methods of :class:`GaussianDiffusion` that say what is sampled from.

    Images are (N, C, …) in [−1, 1], t is int64 (N,), 0-based. Results are float32, whatever 16-bit type comes in
    (float64 for float64), and log-variances natural.
    """

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each of x_start's shape (arXiv 2006.11239, eq. 4)."""
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start,
            self._at("one_minus_alphas_cumprod", t, x_start).expand(x_start.shape),
            self._at("log_one_minus_alphas_cumprod", t, x_start).expand(x_start.shape),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0) in one pass (`diffkern.ops.q_sample`), with `noise` or, without it, noise drawn here."""
        source = noise_source(self.noise, x_start) if noise is None else {"noise": noise}
        return ops.q_sample(  # type: ignore[return-value]
            at_least_float32(x_start),
            self._checked(t, x_start),
            self._tensor("sqrt_alphas_cumprod", x_start.device),
            self._tensor("sqrt_one_minus_alphas_cumprod", x_start.device),
            **source,
        )

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t−1} | x_t, x_0), each of x_t's shape (eq. 7)."""
        _check_shape("x_start", x_start, x_t)
        coef1, coef2 = (self._at(f"posterior_mean_coef{k}", t, x_t) for k in (1, 2))
        return (
            coef1 * x_start + coef2 * x_t,
            self._at("posterior_variance", t, x_t).expand(x_t.shape),
            self._at("posterior_log_variance_clipped", t, x_t).expand(x_t.shape),
        )

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """What `model(x, t, **model_kwargs)` says of p(x_{t−1} | x_t): `mean`, `variance`, `log_variance`,
        `pred_xstart`, each of x's shape.

        pred_xstart has been through `denoised_fn`, if there is one, and then into [−1, 1], if `clip_denoised`.
        Raises ValueError for a model output of the wrong shape.
        """
        t = self._checked(t, x)
        return self._said_by(self._output(model, x, t, model_kwargs), x, t, clip_denoised, denoised_fn)

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """The mean moved by the variance times the gradient `cond_fn(x, t, **model_kwargs)` of log p(y | x).

        Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 1. (N, C, …), float32.
        """
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        return at_least_float32(p_mean_var["mean"]) + p_mean_var["variance"] * at_least_float32(gradient)

    def condition_score(
        self, cond_fn: Model, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """p_mean_var with `pred_xstart` and `mean` of the score that `cond_fn`'s gradient has been added to.

        ε' = ε − √(1−ᾱ_t)·gradient (arXiv 2105.05233, algorithm 2); the new pred_xstart is not clipped.
        """
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        sigma = self._at("one_minus_alphas_cumprod", t, x).sqrt()
        eps = eps - sigma * self._gradient(cond_fn, x, t, model_kwargs)
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x0 = √(1/ᾱ)·x_t − √(1/ᾱ−1)·ε."""
        _check_shape("eps", eps, x_t)
        recip, recipm1 = self._reciprocals(t, x_t)
        return recip * x_t - recipm1 * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x0 = (xprev − coef2·x_t)/coef1: the posterior's mean, solved for x0."""
        _check_shape("xprev", xprev, x_t)
        of_xprev, of_x_t = (self._at(name, t, x_t) for name in ("xstart_of_xprev", "xstart_of_x_t"))
        return of_xprev * xprev + of_x_t * x_t

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """ε = (√(1/ᾱ)·x_t − x0)/√(1/ᾱ−1)."""
        recip, recipm1 = self._reciprocals(t, x_t)
        return (recip * x_t - pred_xstart) / recipm1

    def _reciprocals(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("sqrt_recip_alphas_cumprod", t, like), self._at("sqrt_recipm1_alphas_cumprod", t, like)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """What the network is given for t: t itself, or a float t·1000/T with `rescale_timesteps`."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _wrap_model(self, model: Model) -> Model:
        """The function that is called in the model's or cond_fn's place: here the same one."""
        return model

    def _output(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
        check_types(self.model_mean_type, self.model_var_type)
        output = self._wrap_model(model)(x, self._scale_timesteps(t), **(model_kwargs or {}))
        self._check_output(output, x)
        return output

    def _gradient(self, cond_fn: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
        gradient = self._wrap_model(cond_fn)(x, self._scale_timesteps(t), **(model_kwargs or {}))
        # None would be taken for a step without a classifier.
        if not isinstance(gradient, Tensor):
            raise TypeError(f"cond_fn must return a tensor, got {type(gradient).__name__}")
        return gradient

    def _said_by(
        self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool, denoised_fn: DenoisedFn
    ) -> dict[str, Tensor]:
        """`p_mean_variance` of a network's output."""
        output = output.to(torch.promote_types(at_least_float32(output).dtype, x.dtype))
        variance, log_variance = self._variance(output, x, t)
        output = output[:, : x.shape[1]] if self._learns_variance else output
        x0 = self._xstart(output, x, t, clip_denoised, denoised_fn)
        previous = self.model_mean_type == ModelMeanType.PREVIOUS_X
        mean = output if previous else self.q_posterior_mean_variance(x0, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def _xstart(
        self, mean: Tensor, x: Tensor, t: Tensor, clip_denoised: bool, denoised_fn: DenoisedFn = None
    ) -> Tensor:
        """`pred_xstart` of the mean's channels of a network's output."""
        if self.model_mean_type == ModelMeanType.START_X:
            x0 = mean
        elif self.model_mean_type == ModelMeanType.PREVIOUS_X:
            x0 = self._predict_xstart_from_xprev(x, t, mean)
        else:
            x0 = self._predict_xstart_from_eps(x, t, mean)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        return x0.clamp(-1, 1) if clip_denoised else x0

    def _variance(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(variance, log-variance) of p(x_{t−1} | x_t), each of x's shape."""
        if not self._learns_variance:
            named = (self._at(name, t, x) for name in ("model_variance", "model_log_variance"))
            return tuple(values.expand(x.shape) for values in named)  # type: ignore[return-value]
        log_variance = output[:, x.shape[1] :]
        if self.model_var_type == ModelVarType.LEARNED_RANGE:
            fraction = (log_variance + 1) / 2
            low, high = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
            log_variance = fraction * high + (1 - fraction) * low
        return log_variance.exp(), log_variance

    @property
    def _learns_variance(self) -> bool:
        return self.model_var_type in _LEARNED

    def _check_output(self, output: Tensor, x: Tensor) -> None:
        learned = self._learns_variance
        wanted = (len(x), 2 * x.shape[1], *x.shape[2:]) if learned else tuple(x.shape)
        if tuple(output.shape) == wanted:
            return
        channels = f"with {self.model_var_type} it gives 2C channels, the mean's and the variance's"
        if not learned:
            channels = (
                f"with {self.model_var_type} it gives C channels; for 2C set a learned model_var_type (learn_sigma)"
            )
        raise ValueError(
            f"model returned shape {tuple(output.shape)}; for x of {tuple(x.shape)} it must be {wanted}: {channels}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it has fewer bits: what multiplying it with a float32 table makes of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_shape(name: str, value: Tensor, x_t: Tensor) -> None:
    if value.shape != x_t.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be x_t's, {tuple(x_t.shape)}")
