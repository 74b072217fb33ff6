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

if TYPE_CHECKING:
    from diffkern.process.gaussian import ProcessTables

TARGETS = ("eps", "x0", "v")
LOSSES = ("mse",)


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    target: str = "eps",
    loss: str = "mse",
    weight: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """weight_n · mean((model_output_n − target_n)²) for each sample n (Ho et al. 2020, arXiv 2006.11239, eq. 14).

    The target is ε, x0 or v = √ᾱ_t·ε − √(1−ᾱ_t)·x0 (Salimans & Ho 2022, arXiv 2202.00512); it is never stored.

    model_output: (N, …), float32, bfloat16, float16 or float64, any strides.
    x0: model_output's shape, any floating dtype. Read for targets "x0" and "v".
    t: int64 (N,) on model_output's device, 0-based, in [0, T).
    tables: `GaussianProcess.tables(device)`: float64 (or float32) (T,). Their values are read for target "v".
    loss: "mse", the only one so far. weight: (N,), float32 or float64, or None for 1.
    Noise, for targets "eps" and "v": exactly one of noise, of x0's shape and any floating dtype; seed (with draw,
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
    arguments = _arguments(
        model_output, x0, t, tables, target, loss, weight, noise, seed, draw, samples, stream, generator
    )
    return OP(*arguments)


def diffusion_loss_and_grad(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    scale: float | Tensor,
    target: str = "eps",
    loss: str = "mse",
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
    arguments = _arguments(
        model_output, x0, t, tables, target, loss, weight, noise, seed, draw, samples, stream, generator
    )
    with torch.no_grad():
        return AND_GRAD(*arguments, _scale_tensor(scale, model_output))


def _arguments(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    target: str,
    loss: str,
    weight: Tensor | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int | Tensor,
    samples: int | Tensor,
    stream: int,
    generator: torch.Generator | None,
) -> tuple[Any, ...]:
    """The schema's arguments, checked; None for what the target does not read."""
    check_floating("model_output", model_output)
    check_like("x0", x0, "model_output", model_output)
    count = model_output.shape[0]
    check_index("t", t, "model_output", model_output, [(count,)])
    signal, sigma = _checked_tables(tables, model_output)
    if target not in TARGETS:
        raise ValueError(f'target must be "eps", "x0" or "v", got {target!r}')
    if loss not in LOSSES:
        raise ValueError(f'loss must be "mse", got {loss!r}')
    if weight is not None:
        check_like("weight", weight, "model_output", model_output, (count,))
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    source = Noise(None, None, None, None)
    if target != "x0":
        source = resolve_noise(
            x0, "x0", noise=noise, seed=seed, generator=generator, draw=draw, samples=samples, stream=stream
        )
    data = None if target == "eps" else x0
    return model_output, data, t, signal, sigma, weight, *source, stream, target


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
