"""One step of a sampler: a pass of `diffkern.ops.solver_step`, or the methods it is made of where it cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.integrations.draws import noise_source, skip_randn_like
from diffkern.integrations.guided_diffusion import programs
from diffkern.integrations.guided_diffusion.distributions import (
    DenoisedFn,
    Distributions,
    Kwargs,
    Model,
    at_least_float32,
)
from diffkern.integrations.guided_diffusion.hooks import methods_of, overridden
from diffkern.integrations.guided_diffusion.tables import gathered
from diffkern.ops import solver_step
from diffkern.ops._memory import output_like
from diffkern.solvers import StepProgram

# What a subclass may have its own of; a step is then made of these methods and not in one pass.
_HOOKS = methods_of(
    Distributions,
    "p_mean_variance",
    "condition_mean",
    "condition_score",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
)


class Steps(Distributions):
    """The steps of :class:`GaussianDiffusion`.

    Each takes x (N, C, …) at t (N,), int64, and returns `sample` and `pred_xstart`, both of x's shape and memory
    format and float32 (float64 for float64). `clip_denoised`, `denoised_fn` and `model_kwargs` are those of
    `p_mean_variance`; `cond_fn(x, t, **model_kwargs)` is the gradient of log p(y | x) of a classifier. Without
    model_kwargs neither function gets further arguments.

    Each raises ValueError or TypeError naming the argument; a t out of range raises ValueError on a CPU and gives NaN
    for that sample elsewhere.
    """

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """An ancestral step, x_{t−1} ~ p(x_{t−1} | x_t). Noise is drawn after the model's call, also for t = 0, which
        adds none. `cond_fn` moves the mean (`condition_mean`).
        """
        t = self._checked(t, x)
        output, known = self._ask(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        source = noise_source(self.noise, x)
        if known is None:
            extra = None if cond_fn is None else self._gradient(cond_fn, x, t, model_kwargs)
            program = self._program(programs.ancestral, bool(clip_denoised))
            sample, x0 = _pass(program, output, x, t, extra, source)
            return {"sample": sample, "pred_xstart": x0}
        mean = known["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, known, x, t, model_kwargs=model_kwargs)
        sample = mean + (0.5 * known["log_variance"]).exp() * self._masked(source, x, t)
        return {"sample": sample, "pred_xstart": known["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """DDIM's step with noise of η·√β̃_t; η in [0, 1] (arXiv 2010.02502, eq. 12). With `noise="torch"` noise is drawn
        whatever η is. `cond_fn` moves ε (`condition_score`).
        """
        t = self._checked(t, x)
        eta = float(eta)
        output, known = self._ask(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if known is None:
            extra = None if cond_fn is None else self._gradient(cond_fn, x, t, model_kwargs)
            program = self._program(programs.implicit, bool(clip_denoised), eta, extra is not None)
            source = self._implicit_source(eta, x)
            sample, x0 = _pass(program, output[:, : x.shape[1]], x, t, extra, source)
            if extra is not None:
                x0 = x0 + self._at("score_to_xstart", t, x0) * extra
            return {"sample": sample, "pred_xstart": x0}
        if cond_fn is not None:
            known = self.condition_score(cond_fn, known, x, t, model_kwargs=model_kwargs)
        x0 = known["pred_xstart"]
        of_x0, of_eps, std = self._terms(programs.implicit_terms, x, t, eta)
        sample = of_x0 * x0 + of_eps * self._predict_eps_from_xstart(x, t, x0)
        source = self._implicit_source(eta, x)
        return {"sample": sample + std * self._masked(source, x, t) if eta else sample, "pred_xstart": x0}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """DDIM's step from x_t to x_{t+1}, which has no noise: eta must be 0."""
        if eta != 0:
            raise ValueError(f"eta is {eta}; it must be 0: only the deterministic process has a way back")
        t = self._checked(t, x)
        output, known = self._ask(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if known is None:
            program = self._program(programs.inversion, bool(clip_denoised))
            sample, x0 = _pass(program, output[:, : x.shape[1]], x, t, None, {})
            return {"sample": sample, "pred_xstart": x0}
        x0 = known["pred_xstart"]
        of_x0, of_eps = self._terms(programs.inversion_terms, x, t)
        return {"sample": of_x0 * x0 + of_eps * self._predict_eps_from_xstart(x, t, x0), "pred_xstart": x0}

    def _ask(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: DenoisedFn,
        model_kwargs: Kwargs,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The network's output, and what `p_mean_variance` makes of it where the step cannot be one pass, else None."""
        if denoised_fn is not None or overridden(self, _HOOKS):
            known = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            return x, known
        output = self._output(model, x, t, model_kwargs)
        if _differentiated(x, output):
            return output, self._said_by(output, x, t, clip_denoised, None)
        return output, None

    def _program(self, make: Callable[..., StepProgram], *options: Any) -> StepProgram:
        return self._once((make, *options), lambda: make(self, *options))

    def _terms(self, make: Callable[..., tuple[np.ndarray, ...]], x: Tensor, t: Tensor, *options: Any) -> list[Tensor]:
        """The tables that `make` returns, at t."""
        tables = self._once(
            (make, x.device, *options), lambda: [torch.tensor(c, device=x.device) for c in make(self, *options)]
        )
        return [gathered(table, t, x) for table in tables]

    def _implicit_source(self, eta: float, x: Tensor) -> dict[str, Any]:
        """The noise of a DDIM step: the replaced code draws it even where η = 0 leaves nothing of it."""
        if eta:
            return noise_source(self.noise, x)
        if self.noise == "torch":
            skip_randn_like(x)
        return {}

    def _masked(self, source: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
        """A step's unit noise as a tensor like x, 0 where t = 0."""
        if "noise" in source:
            return source["noise"] * (t != 0).reshape(-1, *[1] * (x.dim() - 1))
        like = at_least_float32(x.detach())
        return solver_step(like, like, self._program(programs.masked_noise), t, **source)  # type: ignore[return-value]


def _pass(
    program: StepProgram, output: Tensor, x: Tensor, t: Tensor, extra: Tensor | None, source: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(sample, x0) of the program's rows t."""
    x = x.to(torch.promote_types(torch.promote_types(x.dtype, output.dtype), torch.float32))
    x0 = output_like(x)
    return solver_step(x, output, program, t, slots=[x0], extra=extra, **source), x0  # type: ignore[return-value]


def _differentiated(x: Tensor, output: Tensor) -> bool:
    """Whether derivatives are wanted, also of x0, which `solver_step` writes without one."""
    return (
        (torch.is_grad_enabled() and (x.requires_grad or output.requires_grad))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )
