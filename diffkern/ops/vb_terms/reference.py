"""vb_terms as the formulas read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.ops._indices import check_values, gather, per_sample
from diffkern.ops._layout import dense, flat_samples, in_layout_of
from diffkern.ops.philox_normal.reference import normals
from diffkern.ops.vb_terms.decoder import decode


class Elements(NamedTuple):
    """Per element, in the arithmetic's dtype: what the sums and the gradients are made of.

    residual: m − m̂. x0_error: x0 − x̂0, of the clipped x̂0 if there is a clip; `inside` is 1 where it passed that
    unchanged (and for x_prev, whose mean is not made of x̂0, in the bound). value: the bound's term in nats, with its
    derivatives by the difference μ̃ − μ of the means, by Δ = log σ² − log β̃ and by log β̃ with Δ held.
    """

    y: Tensor | None
    x0: Tensor
    variance_channels: Tensor | None
    residual: Tensor
    x0_error: Tensor
    inside: Tensor
    difference: Tensor
    value: Tensor
    of_difference: Tensor
    of_delta: Tensor
    of_log_var: Tensor


class Arguments(NamedTuple):
    """The registered op's arguments by name."""

    model_output: Tensor
    x0: Tensor
    t: Tensor
    coefficients: Tensor
    y: Tensor | None
    seed: Tensor | None
    draw: Tensor | None
    samples: Tensor | None
    stream: int
    target: str
    x0_in_target: bool
    learned: bool
    stops_mean: bool
    levels: int
    decoder: str
    clip: list[float] | None


def vb_terms(*arguments: Any) -> Tensor:
    return _terms(elements(Arguments(*arguments)))


def vb_terms_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, scale = arguments
    args = Arguments(*rest)
    found = elements(args)
    return _terms(found), _gradient(args, found, scale)


def elements(args: Arguments) -> Elements:
    """Everything the sums and gradients need, per element."""
    check_values("t", args.t, args.coefficients.shape[0])
    compute = torch.float64 if args.model_output.dtype == torch.float64 else torch.float32
    of_y, of_x0, x0_scale, coef1, log_var, bias, slope = gather(args.coefficients, args.t).unbind(1)
    x0 = args.x0.to(compute)

    def column(values: Tensor) -> Tensor:
        return per_sample(values.to(compute), x0)

    output = args.model_output.to(compute)
    mean, channels = (output[:, : x0.shape[1]], output[:, x0.shape[1] :]) if args.learned else (output, None)
    y = args.y
    if y is None and args.seed is not None:
        assert args.draw is not None and args.samples is not None
        y = normals(x0.shape, args.seed, args.draw, args.samples, args.stream)
    y = None if y is None else y.to(compute)
    wanted = torch.zeros_like(x0) if y is None else column(of_y) * y
    if args.x0_in_target:
        wanted = wanted + column(of_x0) * x0
    residual = mean - wanted
    x0_error, inside = column(x0_scale) * residual, torch.ones_like(residual)
    difference = column(coef1 * x0_scale) * residual
    if args.clip is not None:
        low, high = args.clip
        predicted = x0 - x0_error
        x0_error = x0 - predicted.clamp(low, high)
        if args.target != "x_prev":
            difference = column(coef1) * x0_error
        inside = torch.where((predicted < low) | (predicted > high), 0.0, inside)

    delta = column(bias).expand_as(residual)
    if channels is not None:
        delta = delta + column(slope) * channels
    # KL(q(x_{t−1} | x_t, x0) ‖ p): ½(Δ + e^−Δ − 1 + e^−Δ·(μ̃ − μ)²/β̃)
    precision = torch.exp(-delta)
    posterior_precision = column(torch.exp(-log_var))
    squared = posterior_precision * difference * difference
    # Where Δ is small its terms all but cancel.
    remainder = (delta.double() + torch.expm1(-delta.double())).to(compute)
    value = (remainder + precision * squared) / 2
    of_difference = precision * posterior_precision * difference
    of_delta = (-torch.expm1(-delta) - precision * squared) / 2
    of_log_var = -precision * squared / 2
    if args.t.numel():
        first = column((args.t == 0).double()) > 0
        # What the decoder makes of the other samples is not used: 0 keeps it finite.
        mean_off, log_variance, level = (
            torch.where(first, values, 0.0) for values in (difference, delta + column(log_var), x0)
        )
        decoded = decode(mean_off, log_variance, level, args.levels, args.decoder)
        value = torch.where(first, decoded.value, value)
        of_difference = torch.where(first, decoded.of_difference, of_difference)
        of_delta = torch.where(first, decoded.of_log_var, of_delta)
        of_log_var = torch.where(first, decoded.of_log_var, of_log_var)
    return Elements(y, x0, channels, residual, x0_error, inside, difference, value, of_difference, of_delta, of_log_var)


def of_mean(args: Arguments, found: Elements, scale: Tensor) -> Tensor:
    """The gradient of Σ scale·terms by the mean's channels, in the arithmetic's dtype; scale float64 (3,) or (N, 3)."""
    x0_scale, coef1 = gather(args.coefficients, args.t)[:, 2:4].unbind(1)
    of_mse, of_vb, of_x0 = per_element_scales(scale, found.residual)
    inside = found.inside
    gradient = _on(of_mse * 2, found) * found.residual
    gradient = gradient + _on(of_x0 * 2 * x0_scale, found) * found.x0_error * inside
    if not args.stops_mean:
        reaches = torch.ones_like(inside) if args.target == "x_prev" else inside
        gradient = gradient + _on(of_vb * coef1 * x0_scale, found) * found.of_difference * reaches
    return gradient


def of_variance(args: Arguments, found: Elements, scale: Tensor) -> Tensor:
    """The same by the variance's channels."""
    slope = gather(args.coefficients, args.t)[:, 6]
    return _on(per_element_scales(scale, found.residual)[1] * slope, found) * found.of_delta


def per_element_scales(scale: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an element of `like` (N, …) adds to Σ scale·terms is multiplied with: float64, () or (N,) each."""
    size = max(math.prod(like.shape[1:]), 1)
    of_mse, of_vb, of_x0 = (scale.double() / size).unbind(-1)
    return of_mse, of_vb / math.log(2), of_x0


def _on(values: Tensor, found: Elements) -> Tensor:
    return per_sample(values.to(found.residual.dtype), found.residual)


def _gradient(args: Arguments, found: Elements, scale: Tensor) -> Tensor:
    gradient = of_mean(args, found, scale)
    if args.learned:
        gradient = torch.cat([gradient, of_variance(args, found, scale)], dim=1)
    return in_layout_of(gradient.to(args.model_output.dtype), dense(args.model_output))


def _terms(found: Elements) -> Tensor:
    """(N, 3): mse, vb, x0_mse."""

    def mean(values: Tensor) -> Tensor:
        return flat_samples(values).double().mean(1)

    terms = (mean(found.residual.square()), mean(found.value) / math.log(2), mean(found.x0_error.square()))
    return torch.stack(terms, dim=1).to(found.residual.dtype)


def vb_terms_unsupported(*args: object) -> None:
    return None


def vb_terms_and_grad_unsupported(*args: object) -> None:
    return None
