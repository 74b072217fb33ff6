"""The forward process: noising x0 to any timestep in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.ops._checks import check_floating, check_index, check_table
from diffkern.ops._indices import gather, per_sample, table_gradient
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._noise import draws_in_kernel, resolve_noise
from diffkern.ops._registry import Op
from diffkern.ops.philox_normal.op import OP as PHILOX_NORMAL


def q_sample(
    x0: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 3,
    generator: torch.Generator | None = None,
    return_noise: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε for each sample's own t (Ho et al. 2020, eq. 4), or (x_t, ε) with `return_noise`.

    x0: (N, …), float32, bfloat16, float16 or float64, any strides.
    t: int64 (N,) on x0's device, 0-based, in [0, T).
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: (T,), float64 (as GaussianProcess.tables gives) or float32;
        cast to float32 after the gather (not for float64 x0).
    Exactly one of: noise, of x0's shape; seed (with draw, samples, stream: see philox_normal), the noise is then
        computed inside the pass and again in the backward pass; generator, the numbers of torch.randn_like(x0).
    Arithmetic in float32 (float64 for float64 x0). x_t and ε have x0's dtype and memory format (contiguous if x0 is
    neither contiguous nor channels last); with `seed`, ε is the rounding of the float32 normal that x_t was made with.

    Gradients flow to x0, noise and the tables. Raises ValueError or TypeError naming the argument; an index t out of
    range raises ValueError on a CPU and gives NaN for that sample elsewhere.
    """
    check_floating("x0", x0)
    check_index("t", t, "x0", x0, [(x0.shape[0],)])
    check_table("sqrt_alphas_cumprod", sqrt_alphas_cumprod, "x0", x0)
    check_table("sqrt_one_minus_alphas_cumprod", sqrt_one_minus_alphas_cumprod, "x0", x0)
    if sqrt_alphas_cumprod.shape != sqrt_one_minus_alphas_cumprod.shape:
        raise ValueError(
            "sqrt_one_minus_alphas_cumprod must be as long as sqrt_alphas_cumprod, got "
            f"{sqrt_one_minus_alphas_cumprod.shape[0]} and {sqrt_alphas_cumprod.shape[0]}"
        )
    if generator is not None and noise is None and seed is None:
        arguments = (x0, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, None, None, None, None, stream)
        draws = draws_in_kernel(OP, (*arguments, return_noise), x0, generator)
        if draws is not None:
            x_t, drawn = OP.run(*arguments, return_noise, draws)
            return (x_t, drawn) if return_noise else x_t
    source = resolve_noise(
        x0, "x0", noise=noise, seed=seed, generator=generator, draw=draw, samples=samples, stream=stream
    )
    wants_noise = return_noise and source.given is None
    x_t, generated = OP(x0, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, *source, stream, wants_noise)
    if not return_noise:
        return x_t
    return x_t, generated if source.given is None else source.given


def _fake(
    x0: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    draw: Tensor | None,
    samples: Tensor | None,
    stream: int,
    return_noise: bool,
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(x0), empty_like_layout(x0) if return_noise else x0.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, t, signal, sigma, noise, seed, draw, samples, stream, _ = inputs
    table_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x0 if table_grad else None, t, signal, sigma, noise, seed, draw, samples)
    ctx.stream, ctx.shape, ctx.x0_dtype = stream, x0.shape, x0.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x0, t, signal, sigma, noise, seed, draw, samples = ctx.saved_tensors
    compute = torch.float64 if ctx.x0_dtype == torch.float64 else torch.float32
    grad = grad.to(compute)
    grads: list[Tensor | None] = [None] * 10
    if ctx.needs_input_grad[0]:
        grads[0] = (per_sample(gather(signal, t).to(compute), grad) * grad).to(ctx.x0_dtype)
    if noise is not None and ctx.needs_input_grad[4]:
        grads[4] = (per_sample(gather(sigma, t).to(compute), grad) * grad).to(noise.dtype)
    if ctx.needs_input_grad[2]:
        grads[2] = table_gradient(signal, t, grad, x0)
    if ctx.needs_input_grad[3]:
        if noise is None:
            noise = PHILOX_NORMAL(list(ctx.shape), seed, draw, samples, ctx.stream, compute, False)
        grads[3] = table_gradient(sigma, t, grad, noise)
    return tuple(grads)


OP = Op(
    "q_sample(Tensor x0, Tensor t, Tensor sqrt_alphas_cumprod, Tensor sqrt_one_minus_alphas_cumprod, Tensor? noise, "
    "Tensor? seed, Tensor? draw, Tensor? samples, int stream, bool return_noise) -> (Tensor, Tensor)",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
