"""The training loss per sample, with its target made in the pass, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffkern.ops._checks import check_floating, check_index, check_like, check_table
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._noise import Noise, resolve_noise
from diffkern.ops._registry import Op
from diffkern.ops.diffusion_loss.backward import diffusion_loss_backward
from diffkern.ops.vb_terms.coefficients import TARGETS as TARGETS
from diffkern.ops.vb_terms.coefficients import target_coefficients
from diffkern.ops.vb_terms.op import AND_GRAD as VB_TERMS_AND_GRAD
from diffkern.ops.vb_terms.op import OP as VB_TERMS
from diffkern.ops.vb_terms.op import bound_arguments, check_data, check_posterior, resolved_variance

if TYPE_CHECKING:
    from diffkern.process.gaussian import ProcessTables

SQUARED = ("mse",)
OF_THE_BOUND = ("rescaled_mse", "hybrid", "kl", "rescaled_kl")
LOSSES = (*SQUARED, *OF_THE_BOUND)


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    target: str = "eps",
    loss: str = "mse",
    variance: str | None = None,
    levels: int = 256,
    weight: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """weight_n · loss for each sample n, with its target made in the pass.

    "mse": mean((model_output_n − target_n)²) (Ho et al. 2020, arXiv 2006.11239, eq. 14). The target is ε, x0,
    v = √ᾱ_t·ε − √(1−ᾱ_t)·x0 (Salimans & Ho 2022, arXiv 2202.00512), the posterior's mean for "x_prev", or ε − x0 for
    "flow"; it is never stored. The others have vb, the term of the variational bound at t in bits/dim
    (:func:`vb_terms`, with OpenAI's decoder):

        kl            vb                       rescaled_kl     T·vb
        hybrid        mse + vb                 rescaled_mse    mse + T/1000·vb

    In the last two vb's gradient stops at the mean's channels: it trains the variance alone (Nichol & Dhariwal 2021,
    arXiv 2102.09672, eq. 16, whose factor is rescaled_mse's). With a fixed variance there is nothing for it to train,
    and both are mse.

    model_output: (N, …), float32, bfloat16, float16 or float64, any strides; with a learned variance (N, 2C, …), the
        mean's channels and the variance's, which "mse" leaves alone.
    x0: the mean's shape, any floating dtype. Read for every loss and target but "mse" of "eps".
    t: int64 (N,) on model_output's device, 0-based, in [0, T).
    tables: `GaussianProcess.tables(device)`: float64 (or float32) (T,). "mse" of "eps" and "x0" reads none of them,
        that of "v" and "flow" no posterior, which all else needs.
    variance: of the reverse step, as in `vb_terms`; None for the one of the process that the tables are of.
    levels: how many grey levels the data have in [−1, 1].
    weight: (N,), float32 or float64, or None for 1.
    Noise, where ε is read: exactly one of noise, of x0's shape and any floating dtype; seed (with draw,
        samples, stream: see philox_normal), ε is then computed inside the pass and again in the backward pass, in the
        arithmetic's dtype whatever x0's; generator, the numbers of torch.randn_like(x0). With target "x0" a source may
        be given and is ignored: nothing is drawn.

    Returns (N,), float32 (float64 for float64 model_output), as is the arithmetic; the mean runs over all axes but the
    first, summed in blocks that are joined in double, always in the same order. The mean of an empty sample is NaN,
    as torch's. NaN or Inf in one sample stays in that sample.
    Gradients (docs/diffusion_loss.md) flow to model_output, weight, and what the target is made of: x0, noise and the
    tables; there is no second derivative. Raises ValueError or TypeError naming the argument; an index t out of range
    raises ValueError on a CPU and gives NaN for that sample elsewhere.
    """
    source = {"noise": noise, "seed": seed, "draw": draw, "samples": samples, "stream": stream, "generator": generator}
    call = _Call(model_output, x0, t, tables, target, loss, variance, levels, weight, source)
    if not call.bounded:
        return OP(*call.squared_arguments())
    of_mse, of_vb = call.factors()
    terms = VB_TERMS(*call.bound_arguments())
    value = of_vb * terms[:, 1]
    if of_mse:
        value = terms[:, 0] + value
    return value if weight is None else (weight.double() * value).to(value.dtype)


def diffusion_loss_and_grad(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    scale: float | Tensor,
    target: str = "eps",
    loss: str = "mse",
    variance: str | None = None,
    levels: int = 256,
    weight: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(diffusion_loss(…), the gradient of scale · its sum with respect to model_output), in one pass.

    scale: a number or a floating tensor () on model_output's device, which is not waited for: 1/N for the mean over the
        batch, times what a loss scaler asks for. The loss is not scaled.
    The gradient has model_output's dtype and memory format (contiguous if that is neither contiguous nor channels
    last) and is rounded once, after scaling. Both results are constants to autograd: go on with
    `model_output.backward(gradient)`. Otherwise as `diffusion_loss`.
    """
    source = {"noise": noise, "seed": seed, "draw": draw, "samples": samples, "stream": stream, "generator": generator}
    call = _Call(model_output, x0, t, tables, target, loss, variance, levels, weight, source)
    with torch.no_grad():
        factor = _scale_tensor(scale, model_output)
        if not call.bounded:
            value, gradient = AND_GRAD(*call.squared_arguments(), factor)
            return value, call.with_variance_channels(gradient)
        of_mse, of_vb = call.factors()
        # On the device, from a scalar there: a list would be copied to it, which no CUDA graph can capture.
        per_term = torch.stack([of_mse * factor, of_vb * factor, torch.zeros_like(factor)])
        if weight is not None:
            per_term = weight.double().unsqueeze(1) * per_term
        terms, gradient = VB_TERMS_AND_GRAD(*call.bound_arguments(), per_term)
        value = of_vb * terms[:, 1]
        if of_mse:
            value = terms[:, 0] + value
        return value if weight is None else (weight.double() * value).to(value.dtype), gradient


class _Call:
    """The arguments of either function, checked: which pass computes the loss, and what that pass is given."""

    def __init__(
        self,
        model_output: Tensor,
        x0: Tensor,
        t: Tensor,
        tables: ProcessTables,
        target: str,
        loss: str,
        variance: str | None,
        levels: int,
        weight: Tensor | None,
        source: dict[str, Any],
    ) -> None:
        check_floating("model_output", model_output)
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}, got {target!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
        if weight is not None:
            check_like("weight", weight, "model_output", model_output, (model_output.shape[0],))
            if weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
        if loss in OF_THE_BOUND or variance is not None:
            variance = resolved_variance(tables, variance)
        else:
            variance = getattr(tables, "variance", "fixed")
        self.learned = variance.startswith("learned")
        self.bounded = loss in ("kl", "rescaled_kl") or (self.learned and loss != "mse")
        self.model_output, self.x0, self.t, self.tables = model_output, x0, t, tables
        self.target, self.loss, self.variance, self.levels = target, loss, variance, levels
        self.weight, self.source = weight, source

    def factors(self) -> tuple[float, float]:
        """What mse and vb are multiplied with."""
        steps = self.tables.sqrt_alphas_cumprod.shape[0]
        factors = {"kl": (0.0, 1.0), "rescaled_kl": (0.0, float(steps)), "hybrid": (1.0, 1.0)}
        return factors.get(self.loss, (1.0, steps / 1000))

    def bound_arguments(self) -> tuple[Any, ...]:
        return bound_arguments(
            self.model_output,
            self.x0,
            self.t,
            self.tables,
            target=self.target,
            variance=self.variance,
            levels=self.levels,
            stops_mean=self.loss in ("hybrid", "rescaled_mse"),
            **self.source,
        )

    def squared_arguments(self) -> tuple[Any, ...]:
        """The schema's arguments of the pass that has the squared error alone; None for what the target does not read.

        That pass knows ε, x0 and a·ε − b·x0, which it calls v.
        """
        output, x0 = self.model_output, self.x0
        check_data(output, x0, self.learned)
        if self.learned:
            output = output[:, : x0.shape[1]]
        check_index("t", self.t, "model_output", output, [(output.shape[0],)])
        signal, sigma = _checked_tables(self.tables, output)
        target = self.target
        if target in ("x_prev", "flow"):
            if target == "x_prev":
                check_posterior(self.tables, output)
            signal, of_x0 = target_coefficients(self.tables, target)
            sigma, target = -of_x0, "v"
        noise = Noise(None, None, None, None)
        if target != "x0":
            noise = resolve_noise(x0, "x0", **self.source)
        data = None if target == "eps" else x0
        return output, data, self.t, signal, sigma, self.weight, *noise, self.source["stream"], target

    def with_variance_channels(self, gradient: Tensor) -> Tensor:
        """The gradient of the mean's channels in model_output's shape: 0 for the variance's."""
        if not self.learned:
            return gradient
        whole = empty_like_layout(self.model_output).zero_()
        whole[:, : self.x0.shape[1]] = gradient
        return whole


def _checked_tables(tables: ProcessTables, model_output: Tensor) -> tuple[Tensor, Tensor]:
    try:
        signal, sigma = tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod
    except AttributeError:
        raise TypeError(
            f"tables must be those of a process (GaussianProcess.tables(device)), got {type(tables).__name__}"
        ) from None
    check_table("tables.sqrt_alphas_cumprod", signal, "model_output", model_output)
    check_table("tables.sqrt_one_minus_alphas_cumprod", sigma, "model_output", model_output)
    if signal.shape != sigma.shape:
        raise ValueError(f"tables must be equally long, got {signal.shape[0]} and {sigma.shape[0]}")
    return signal, sigma


def _scale_tensor(scale: float | Tensor, model_output: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        check_like("scale", scale, "model_output", model_output, ())
        return scale.double()
    if not isinstance(scale, int | float | np.floating):
        raise TypeError(f"scale must be a number or a tensor (), got {type(scale).__name__}")
    return torch.full((), float(scale), dtype=torch.float64, device=model_output.device)


def compute_dtype(model_output: Tensor) -> torch.dtype:
    return torch.float64 if model_output.dtype == torch.float64 else torch.float32


def _fake(model_output: Tensor, *rest: object) -> Tensor:
    return model_output.new_empty(model_output.shape[0], dtype=compute_dtype(model_output))


def _fake_and_grad(model_output: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _fake(model_output), empty_like_layout(model_output)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, stream, target = inputs
    ctx.save_for_backward(*tensors)
    ctx.stream, ctx.target = stream, target


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = (*ctx.saved_tensors, ctx.stream, ctx.target)
    return diffusion_loss_backward(AND_GRAD, inputs, grad, ctx.needs_input_grad)


_ARGUMENTS = (
    "Tensor model_output, Tensor? x0, Tensor t, Tensor sqrt_alphas_cumprod, Tensor sqrt_one_minus_alphas_cumprod, "
    "Tensor? weight, Tensor? noise, Tensor? seed, Tensor? draw, Tensor? samples, int stream, str target"
)
OP = Op(
    f"diffusion_loss({_ARGUMENTS}) -> Tensor",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
# Its scale is () or, for the backward pass, (N,): float64.
AND_GRAD = Op(
    f"diffusion_loss_and_grad({_ARGUMENTS}, Tensor scale) -> (Tensor, Tensor)",
    package=__package__,
    fake=_fake_and_grad,
)
