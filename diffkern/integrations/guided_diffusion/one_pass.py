"""Losses and the bound's terms of a network's output, each in one pass that makes the gradient too where one is wanted.

The ops are `diffkern.ops.vb_terms` and `diffkern.ops.diffusion_loss`; what they compute is what the methods of
:class:`Bound` and :class:`Training` do, which stand in where a pass is not possible and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.integrations.guided_diffusion import programs
from diffkern.integrations.guided_diffusion.tables import Tables
from diffkern.integrations.guided_diffusion.types import ModelMeanType, ModelVarType
from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, solver_step
from diffkern.ops.vb_terms.op import AND_GRAD, OP, bound_arguments
from diffkern.process.gaussian import ProcessTables

if TYPE_CHECKING:
    from diffkern.integrations.guided_diffusion.bound import Bound

Source = dict[str, Any]  # noise=ε or seed=…, as the ops take them
Terms = tuple[Tensor, ...]

_TARGETS = {ModelMeanType.EPSILON: "eps", ModelMeanType.START_X: "x0", ModelMeanType.PREVIOUS_X: "x_prev"}
_VARIANCES = {ModelVarType.LEARNED: "learned", ModelVarType.LEARNED_RANGE: "learned_range"}
_LEVELS = 256


def possible(diffusion: Tables, *tensors: Tensor | None) -> bool:
    """Whether a pass gives what the methods would.

    Not if these tensors want a gradient, as the network's output may; nor if tables contradict each other, under
    torch.compile, which fuses the methods by itself, and under torch.func and forward-mode differentiation.
    """
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    transformed = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
    return not (wanted or transformed) and diffusion._once("consistent", lambda: _consistent(diffusion))


def squared_error(
    diffusion: Bound, output: Tensor, x_start: Tensor, t: Tensor, source: Source, again: Callable[[Tensor], Terms]
) -> Terms:
    """(mse,), or with a learned variance (mse, vb), of which vb has no gradient by the mean's channels."""
    output = _widened(output, x_start)
    if diffusion._learns_variance:
        arguments = _arguments(diffusion, x_start, t, source, stops_mean=True)
        return _of_bound(diffusion, output, arguments, (0, 1), again)
    options: dict[str, Any] = {"target": _TARGETS[diffusion.model_mean_type], **source}
    inputs = x_start, t, _tables(diffusion, x_start.device)
    if not (torch.is_grad_enabled() and output.requires_grad):
        return (diffusion_loss(output, *inputs, **options),)

    def evaluate(output: Tensor) -> tuple[Terms, Tensor]:
        mse, gradient = diffusion_loss_and_grad(output, *inputs, scale=1.0, **options)
        return (mse,), gradient

    return _WithGradient.apply(output, evaluate, again)


def bound_term(
    diffusion: Bound,
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip: bool,
    again: Callable[[Tensor], Terms],
) -> Tensor:
    """The bound's term (N,)."""
    arguments = _arguments(diffusion, x_start, t, {"noise": x_t}, y="x_t", clip=_limits(clip))
    return _of_bound(diffusion, _widened(output, x_start, x_t), arguments, (1,), again)[0]


def bound_terms(
    diffusion: Bound, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip: bool
) -> dict[str, Tensor]:
    """`vb`, `xstart_mse` and `mse` (N,) without gradients; ε is off by the error of x0 over √(1/ᾱ−1)."""
    arguments = _arguments(diffusion, x_start, t, {"noise": x_t}, y="x_t", clip=_limits(clip))
    _, vb, x0_mse = OP(*arguments(_widened(output, x_start))).unbind(1)
    return {"vb": vb, "xstart_mse": x0_mse, "mse": x0_mse / diffusion._at("sqrt_recipm1_alphas_cumprod", t, vb) ** 2}


def xstart(diffusion: Bound, output: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Tensor:
    """The x0 that the network predicts from x_t."""
    output = _widened(output, x_t)
    mean = output[:, : x_t.shape[1]]
    if torch.is_grad_enabled() and output.requires_grad:
        return diffusion._xstart(mean, x_t, t, clip)
    program = diffusion._once((programs.xstart, clip), lambda: programs.xstart(diffusion, clip))
    return solver_step(x_t.to(output.dtype), mean, program, t)  # type: ignore[return-value]


class _WithGradient(torch.autograd.Function):
    """Terms (N,) of a network's output, which `evaluate` computes together with their gradient.

    Of two terms one has the gradient's first half along axis 1, the other its second half. `again` makes the terms of
    the output out of differentiable operations: for derivatives of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, evaluate: Callable[[Tensor], tuple[Terms, Tensor]], again: Callable[[Tensor], Terms]
    ) -> Terms:
        terms, gradient = evaluate(output)
        ctx.save_for_backward(output, gradient)
        ctx.again = again
        return terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        output, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # backward(create_graph=True)
            return torch.autograd.grad(ctx.again(output), output, grads, create_graph=True)[0], None, None
        parts = gradient.unflatten(1, (len(grads), -1))
        scales = torch.stack(grads, dim=1).reshape(*parts.shape[:2], *[1] * (parts.dim() - 2))
        return (parts * scales).reshape(gradient.shape), None, None


def _of_bound(
    diffusion: Bound,
    output: Tensor,
    arguments: Callable[[Tensor], tuple[Any, ...]],
    columns: tuple[int, ...],
    again: Callable[[Tensor], Terms],
) -> Terms:
    """These columns of `vb_terms`, with a gradient by the output if one is wanted."""
    if not (torch.is_grad_enabled() and output.requires_grad):
        return _columns(OP(*arguments(output)), columns)

    def evaluate(output: Tensor) -> tuple[Terms, Tensor]:
        terms, gradient = AND_GRAD(*arguments(output), _scale(diffusion, columns, output.device))
        return _columns(terms, columns), gradient

    return _WithGradient.apply(output, evaluate, again)


def _columns(terms: Tensor, columns: tuple[int, ...]) -> Terms:
    """These columns of `terms` (N, 3), each in memory of its own: its user may write into it."""
    return tuple(terms[:, column].clone() for column in columns)


def _arguments(
    diffusion: Bound, x_start: Tensor, t: Tensor, source: Source, **options: Any
) -> Callable[[Tensor], tuple[Any, ...]]:
    """The arguments of `vb_terms` as a function of the network's output."""
    source = {"noise": None, "seed": None, "draw": 0, "samples": 0, "stream": 3, "generator": None, **source}
    return lambda output: bound_arguments(
        output,
        x_start,
        t,
        _tables(diffusion, x_start.device),
        target=_TARGETS[diffusion.model_mean_type],
        variance=None,
        levels=_LEVELS,
        **options,
        **source,
    )


def _tables(diffusion: Bound, device: torch.device) -> ProcessTables:
    def tensor(name: str) -> Tensor:
        return diffusion._tensor(name, device)

    def make() -> ProcessTables:
        variance = _VARIANCES.get(diffusion.model_var_type, "fixed")
        return ProcessTables(
            tensor("sqrt_alphas_cumprod"),
            tensor("sqrt_one_minus_alphas_cumprod"),
            tensor("posterior_mean_coef1"),
            tensor("posterior_mean_coef2"),
            tensor("posterior_log_variance_clipped"),
            tensor("log_betas"),
            tensor("model_log_variance") if variance == "fixed" else None,
            variance,
        )

    return diffusion._once(("tables of the process", device), make)


def _scale(diffusion: Bound, columns: tuple[int, ...], device: torch.device) -> Tensor:
    """1 for each of the columns, float64 (3,)."""
    ones = [float(column in columns) for column in range(3)]
    return diffusion._once(("scale", columns, device), lambda: torch.tensor(ones, dtype=torch.float64, device=device))


def _consistent(diffusion: Tables) -> bool:
    """Whether x0 is made of x_t and ε the way x_t is made of x0 and ε; it need not be once a table was replaced."""
    s, sigma = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    signal = s > 0
    pairs = (
        (diffusion.sqrt_recip_alphas_cumprod[signal] * s[signal], np.ones(signal.sum())),
        (diffusion.sqrt_recipm1_alphas_cumprod[signal] * s[signal], sigma[signal]),
    )
    return all(np.allclose(made, wanted, rtol=1e-9, atol=0) for made, wanted in pairs)


def _widened(output: Tensor, *others: Tensor) -> Tensor:
    """The output in the dtype of the arithmetic: at least float32, float64 if one of the tensors is."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return output.to(dtype)


def _limits(clip: bool) -> tuple[float, float] | None:
    return (-1.0, 1.0) if clip else None
