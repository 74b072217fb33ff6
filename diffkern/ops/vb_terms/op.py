"""The terms of the variational bound per sample, in bits/dim, and the squared errors beside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffkern.ops._checks import check_floating, check_index, check_like, check_table
from diffkern.ops._layout import empty_like_layout
from diffkern.ops._noise import Noise, python_int, resolve_noise
from diffkern.ops._registry import Op
from diffkern.ops.vb_terms.backward import vb_terms_backward
from diffkern.ops.vb_terms.coefficients import TARGETS, VARIANCES, coefficients
from diffkern.ops.vb_terms.decoder import DECODERS

if TYPE_CHECKING:
    from diffkern.process.gaussian import ProcessTables

_OF_THE_POSTERIOR = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped", "log_betas")


class VbTerms(NamedTuple):
    """Per sample (N,): the bound's term in bits/dim, and the mean squared errors of the output and of x0."""

    vb: Tensor
    mse: Tensor
    x0_mse: Tensor


def vb_terms(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    target: str = "eps",
    variance: str | None = None,
    levels: int = 256,
    decoder: str = "tanh",
    clip: tuple[float, float] | None = None,
    noise: Tensor | None = None,
    x_t: Tensor | None = None,
    seed: int | Tensor | None = None,
    draw: int | Tensor = 0,
    samples: int | Tensor = 0,
    stream: int = 3,
    generator: torch.Generator | None = None,
) -> VbTerms:
    """The term of the variational bound at each sample's t, without Monte Carlo but for x_t itself:

    t > 0:  KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t))      t = 0:  −log p(x0 | x_1)

    averaged over a sample's values and divided by ln 2: bits/dim (Ho et al. 2020, arXiv 2006.11239, eqs. 5, 7 and 13;
    learned variances: Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15). The whole bound is the sum over t and the
    prior's term.

    model_output: (N, C, …), what the network gives at x_t, and t; with a learned variance (N, 2C, …), the mean's
        channels and the variance's. float32, bfloat16, float16 or float64, any strides.
    x0: (N, C, …), any floating dtype, in [−1, 1] on `levels` grey levels.
    t: int64 (N,) on model_output's device, 0-based, in [0, T).
    tables: `GaussianProcess.tables(device)`.
    target: what the network predicts: "eps", "x0", "v", "x_prev" or "flow" = ε − x0.
    variance: of the reverse step: "fixed_small" (β̃_t), "fixed_large" (β_t, but β̃_1 at t = 0), "fixed" (that of the
        tables), "learned" (the further channels are log σ²), "learned_range" (−1 in them is log β̃_t, 1 is log β_t).
        None: the one of the process that the tables are of.
    decoder: of the grey levels at t = 0: "exact", or OpenAI's approximation "tanh", which ends at a probability of
        1e-12 a value and has no gradient there. docs/vb_terms.md compares them.
    clip: (lo, hi), into which the predicted x0 is brought before the mean is made of it (an x_prev network gives the
        mean itself); None for none.
    x_t is √ᾱ_t·x0 + √(1−ᾱ_t)·ε, given as exactly one of x_t; noise (ε), both of x0's shape and any floating dtype;
        seed (with draw, samples, stream: see philox_normal), ε is then made again where it is used; generator, the
        numbers of torch.randn_like(x0). With target "x0" nothing of it is read, and it need not be given.

    Returns VbTerms(vb, mse, x0_mse), each (N,): vb as above; mse of the mean's channels against the target; x0_mse of
    the (clipped) predicted x0. float32 (float64 for float64 model_output), as is the arithmetic, but for the exact
    decoder's, which is float64. Means are summed in blocks that are joined in double, always in the same order. The
    mean of an empty sample is NaN. NaN or Inf in one sample stays in that sample.
    Gradients flow to model_output, x0, noise, x_t and the tables; there is no second derivative. Raises ValueError or
    TypeError naming the argument; an index t out of range raises ValueError on a CPU and gives NaN for that sample
    elsewhere.
    """
    given = sum(source is not None for source in (noise, x_t, seed, generator))
    if given > 1 or (given == 0 and target != "x0"):
        raise ValueError(f"exactly one of noise, x_t, seed and generator must be given, got {given}")
    arguments = bound_arguments(
        model_output,
        x0,
        t,
        tables,
        target=target,
        variance=variance,
        levels=levels,
        decoder=decoder,
        clip=clip,
        y="noise" if x_t is None else "x_t",
        noise=noise if x_t is None else x_t,
        seed=seed,
        draw=draw,
        samples=samples,
        stream=stream,
        generator=generator,
    )
    terms = OP(*arguments)
    # Not unbind's views, which autograd lets nobody write into.
    return VbTerms(vb=terms[:, 1], mse=terms[:, 0], x0_mse=terms[:, 2])


def bound_arguments(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: ProcessTables,
    *,
    target: str,
    variance: str | None,
    levels: int,
    decoder: str = "tanh",
    clip: tuple[float, float] | None = None,
    stops_mean: bool = False,
    y: str = "noise",
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int | Tensor,
    samples: int | Tensor,
    stream: int,
    generator: torch.Generator | None,
) -> tuple[Any, ...]:
    """The arguments of the registered op, checked. `y` says whether `noise` is ε or "x_t".

    With `stops_mean` the bound's gradient does not reach the mean's channels.
    """
    check_floating("model_output", model_output)
    kind = resolved_variance(tables, variance)
    learned = kind.startswith("learned")
    check_data(model_output, x0, learned)
    check_index("t", t, "model_output", model_output, [(model_output.shape[0],)])
    check_posterior(tables, model_output)
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}, got {target!r}")
    grey_levels = python_int(levels)
    if grey_levels is None or grey_levels < 2:
        raise ValueError(f"levels must be an int of at least 2, got {levels!r}")
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(map(repr, DECODERS))}, got {decoder!r}")
    if clip is not None and not (len(clip) == 2 and -math.inf < clip[0] < clip[1] < math.inf):
        raise ValueError(f"clip must be (lo, hi) with lo < hi, or None, got {clip}")
    source = Noise(None, None, None, None)
    if target != "x0":
        if y == "x_t" and noise is not None:
            check_like("x_t", noise, "x0", x0)
        source = resolve_noise(
            x0, "x0", noise=noise, seed=seed, generator=generator, draw=draw, samples=samples, stream=stream
        )
    return (
        model_output,
        x0,
        t,
        coefficients(tables, target, kind, y),
        *source,
        stream,
        target,
        target != "eps" or y == "x_t",
        learned,
        stops_mean,
        grey_levels,
        decoder,
        None if clip is None else [float(limit) for limit in clip],
    )


def resolved_variance(tables: ProcessTables, variance: str | None) -> str:
    """`variance`, or the tables' own for None; ValueError unless it is one of VARIANCES that the tables have."""
    kind = getattr(tables, "variance", "fixed") if variance is None else variance
    if kind not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(map(repr, VARIANCES))} or None, got {kind!r}")
    if kind == "fixed" and getattr(tables, "log_variance", None) is None:
        table_of_posterior(tables, "posterior_log_variance_clipped")
        raise ValueError("variance must be given: the tables have no log_variance of a fixed one")
    return kind


def check_data(model_output: Tensor, x0: Tensor, learned: bool) -> None:
    """ValueError unless x0 is of model_output's shape, or of half its channels for a learned variance."""
    shape = tuple(model_output.shape)
    if learned:
        if len(shape) < 2 or shape[1] % 2:
            raise ValueError(f"model_output must be (N, 2C, …) for a learned variance, got shape {shape}")
        shape = (shape[0], shape[1] // 2, *shape[2:])
    check_like("x0", x0, "model_output", model_output, shape)


def check_posterior(tables: ProcessTables, model_output: Tensor) -> None:
    """TypeError or ValueError unless the tables are of a process that has a posterior, all equally long."""
    optional = () if getattr(tables, "log_variance", None) is None else ("log_variance",)
    lengths = set()
    for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", *_OF_THE_POSTERIOR, *optional):
        table = table_of_posterior(tables, name)
        check_table(f"tables.{name}", table, "model_output", model_output)
        lengths.add(table.shape[0])  # len() of a tensor is a Python function
    if len(lengths) > 1:
        raise ValueError(f"tables must be equally long, got {' and '.join(map(str, sorted(lengths)))}")


def table_of_posterior(tables: ProcessTables, name: str) -> Tensor:
    """The table called `name`; ValueError where there is none."""
    table = getattr(tables, name, None)
    if table is None:
        raise ValueError(
            f"tables must have {name}: the posterior is a GaussianProcess's (GaussianProcess.tables(device))"
        )
    return table


def compute_dtype(model_output: Tensor) -> torch.dtype:
    return torch.float64 if model_output.dtype == torch.float64 else torch.float32


def _fake(model_output: Tensor, *rest: object) -> Tensor:
    return model_output.new_empty((model_output.shape[0], 3), dtype=compute_dtype(model_output))


def _fake_and_grad(model_output: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _fake(model_output), empty_like_layout(model_output)


_TENSORS = 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return vb_terms_backward(AND_GRAD, (*ctx.saved_tensors, *ctx.rest), grad, ctx.needs_input_grad)


_ARGUMENTS = (
    "Tensor model_output, Tensor x0, Tensor t, Tensor coefficients, Tensor? noise, Tensor? seed, Tensor? draw, "
    "Tensor? samples, int stream, str target, bool x0_in_target, bool learned, bool stops_mean, int levels, "
    "str decoder, float[]? clip"
)
# The columns of the result are mse, vb and x0_mse; noise may be x_t, which the coefficients then say.
OP = Op(
    f"vb_terms({_ARGUMENTS}) -> Tensor",
    package=__package__,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
# scale: float64, (3,) or (N, 3), one number for each column.
AND_GRAD = Op(
    f"vb_terms_and_grad({_ARGUMENTS}, Tensor scale) -> (Tensor, Tensor)",
    package=__package__,
    fake=_fake_and_grad,
)
