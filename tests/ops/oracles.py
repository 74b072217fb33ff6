"""The formulas in plain torch, independent of diffkern: in float64 the oracle, in the storage dtype what a user writes.

Each takes `dtype`, in which it computes; gradients come from autograd.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffkern.solvers.program import StepProgram


def expand(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))


def q_sample(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """√ᾱ_t·x0 + √(1−ᾱ_t)·ε."""
    return expand(signal[t].to(dtype), x0) * x0.to(dtype) + expand(sigma[t].to(dtype), x0) * noise.to(dtype)


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor,
    target: str,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """weight·mean((model_output − target)²) per sample."""
    x0, noise = x0.to(dtype), noise.to(dtype)
    if target == "v":
        wanted = expand(signal[t].to(dtype), x0) * noise - expand(sigma[t].to(dtype), x0) * x0
    else:
        wanted = {"eps": noise, "x0": x0}[target]
    squares = (model_output.to(dtype) - wanted).square()
    loss = squares.reshape(len(t), squares[:1].numel() if len(t) else 1).mean(1)
    return loss if weight is None else weight.to(dtype) * loss


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The formula in float64. F.group_norm refuses one value a group and one sample; the formula does not."""
    x = x.double() if skip is None else torch.cat([x, skip], 1).double()
    x = x if offset is None else x + expand(offset.double().flatten(1), x)
    groups = x.reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)
    deviation = groups - groups.mean(2, keepdim=True)
    deviation = deviation - deviation.mean(2, keepdim=True)  # what rounding the mean left
    z = (deviation / torch.sqrt(deviation.square().mean(2, keepdim=True) + eps)).reshape(x.shape)
    if weight is not None:
        z = z * expand(weight.double().unsqueeze(0), x)
    if bias is not None:
        z = z + expand(bias.double().unsqueeze(0), x)
    if scale is not None:
        z = z * (1 + expand(scale.double().flatten(1), x))
    if shift is not None:
        z = z + expand(shift.double().flatten(1), x)
    return z * torch.sigmoid(z) if silu else z


def eager_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The composition that group_norm replaces, in x's dtype (F.group_norm without its refusal of single values)."""
    parameters = (weight, bias, scale, shift, offset)
    weight, bias, scale, shift, offset = (None if p is None else p.to(x.dtype) for p in parameters)
    x = x if skip is None else torch.cat([x, skip], 1)
    x = x if offset is None else x + expand(offset.flatten(1), x)
    z = torch.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        z = z * (1 + expand(scale.flatten(1), x))
    if shift is not None:
        z = z + expand(shift.flatten(1), x)
    return F.silu(z) if silu else z


def channel_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """act(x / max(‖x‖₂, eps)·√C·weight·(1 + scale) + shift), the norm of each pixel's channels."""
    z = F.normalize(x.to(dtype), dim=1, eps=eps) * x.shape[1] ** 0.5
    if weight is not None:
        z = z * expand(weight.to(dtype).unsqueeze(0), x)
    if scale is not None:
        z = z * (expand(scale.to(dtype).flatten(1), x) + 1)
    if shift is not None:
        z = z + expand(shift.to(dtype).flatten(1), x)
    return F.silu(z) if silu else z


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None, channels_last: bool) -> Tensor:
    """SDPA of PyTorch, with the copies that it wants, in the dtype of the operands.

    In float64 by its formula: its kernel for CPUs makes 0 of a row of scores that are all NaN.
    """
    if not channels_last:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    by_head = (torch.stack(x.chunk(heads, dim=2), dim=1) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH) if q.dtype == torch.float64 else nullcontext():
        out = torch.cat(F.scaled_dot_product_attention(*by_head, scale=scale).unbind(1), dim=2)
    return out if channels_last else out.transpose(1, 2)


def unpacked(qkv: Tensor, heads: int, order: str, channels_last: bool) -> list[Tensor]:
    """q, k and v, each (B, heads·d, T) or (B, T, heads·d), picked channel by channel."""
    axis = 2 if channels_last else 1
    d = qkv.shape[axis] // (3 * heads)
    place = {
        "hqkvc": lambda part, h, c: (3 * h + part) * d + c,
        "qkvhc": lambda part, h, c: (part * heads + h) * d + c,
        "hcqkv": lambda part, h, c: (h * d + c) * 3 + part,
    }[order]
    every = [[place(part, h, c) for h in range(heads) for c in range(d)] for part in range(3)]
    return [qkv.index_select(axis, torch.tensor(channels)) for channels in every]


def linear_attention(
    qkv: Tensor,
    num_heads: int,
    memory: Tensor | None = None,
    scale: float | None = None,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The two softmaxes and the two products, as a user of PyTorch writes them, in qkv's dtype or another one."""
    x = qkv.to(qkv.dtype if dtype is None else dtype)
    x = x.movedim(-1, 1) if channels_last else x
    q, k, v = x.reshape(len(x), 3, num_heads, x.shape[1] // (3 * num_heads), x.shape[2]).unbind(1)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if memory is not None:
        keys, values = memory.to(x.dtype)
        k = torch.cat([keys.expand(len(x), *keys.shape), k], 3)
        v = torch.cat([values.expand(len(x), *values.shape), v], 3)
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(3), v)
    out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(2) * scale).flatten(1, 2)
    return out.movedim(1, -1) if channels_last else out


def guidance_rescale(model_output: Tensor, guidance_scale: Tensor, phi: float) -> Tensor:
    """φ·std(c)/std(u + w·(c − u)) + 1 − φ per sample, 1 where a sample has no deviation."""
    uncond, cond = model_output.chunk(2)
    guided = uncond + expand(guidance_scale, uncond) * (cond - uncond)
    if cond[0:1].numel() < 2:
        return torch.ones(len(cond), dtype=model_output.dtype) + model_output[:0].sum()  # which has a gradient of 0
    return phi * unbiased_std(cond) / unbiased_std(guided) + 1 - phi


def unbiased_std(x: Tensor) -> Tensor:
    """Per sample; torch.std's one pass is not exact to the last digits of float64. 0 has a gradient of 0, as there."""
    difference = x.flatten(1) - x.flatten(1)[:, :1]
    deviation = difference - difference.mean(1, keepdim=True)
    variance = deviation.square().sum(1) / (deviation.shape[1] - 1)
    return torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, variance).sqrt())


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    program: StepProgram,
    row: Tensor,
    guidance_scale: Tensor | None = None,
    rescale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The quantile of |x0| per sample, clamped to [1, max]; by sorting, so that NaN counts as the largest value."""
    a_x, a_m = (expand(torch.tensor(program.column(name))[row].to(dtype), x) for name in ("a_x", "a_m"))
    m = model_output.to(dtype)
    if guidance_scale is not None:
        uncond, cond = m.chunk(2)
        m = uncond + expand(guidance_scale.to(dtype), x) * (cond - uncond)
        m = m if rescale is None else m * expand(rescale.to(dtype), x)
    magnitudes = (a_x * x.to(dtype) + a_m * m).abs().double().reshape(x.shape[0], -1 if x.numel() else 0)
    if magnitudes.shape[1] == 0:
        return torch.ones(x.shape[0], dtype=torch.float64)
    ratio, largest = program.threshold
    position = ratio * (magnitudes.shape[1] - 1)
    ranks = [int(position), min(int(position) + 1, magnitudes.shape[1] - 1)]
    lower, upper = magnitudes.sort(dim=1).values[:, ranks].unbind(1)
    return torch.lerp(lower, upper, position - ranks[0]).clamp(1.0, largest)


def solver_step(
    x: Tensor,
    model_output: Tensor,
    program: StepProgram,
    rows: list[int],
    *,
    slots: Tensor | None = None,
    guidance: list[float] | None = None,
    rescale: float | None = None,
    extra: Tensor | None = None,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', s·x', slots after) of the equations in diffkern/solvers/program.py, each sample by its own row."""
    column = {name: expand(torch.tensor(program.column(name)[rows], dtype=dtype), x) for name in column_names(program)}
    output, state, n = model_output.to(dtype), x.to(dtype), len(rows)
    channels = x.shape[1] if program.variance != "fixed" else None
    m = output[:, :channels] if channels else output
    if guidance is not None:
        uncond, cond = m[:n], m[n:]
        m = uncond + expand(torch.tensor(guidance, dtype=dtype), x) * (cond - uncond)
        if rescale:
            ratio = cond.flatten(1).std(1) / m.flatten(1).std(1)
            m = m * expand(rescale * ratio + 1 - rescale, x)
    history = [] if slots is None else list(slots.to(dtype).unbind(0))
    x0 = term(column["a_x"], state) + term(column["a_m"], m)
    lo, hi = program.clip or (-1.0, 1.0)
    if program.threshold is not None:
        ratio, largest = program.threshold
        s = torch.ones(n, dtype=torch.float64)
        if x0.numel():
            s = torch.quantile(x0.abs().double().reshape(n, -1), ratio, dim=1).clamp(1.0, largest)
        s = expand(s.to(dtype), x)
        x0 = torch.minimum(torch.maximum(x0, lo * s), hi * s) / s
    elif program.clip is not None:
        x0 = x0.clamp(lo, hi)
    sigma: Tensor | float = 1.0
    if program.variance != "fixed":
        log_variance = output[-n:, channels:]
        if program.variance == "learned_range":
            f = (log_variance + 1) / 2
            log_variance = f * column["log_var_max"] + (1 - f) * column["log_var_min"]
        sigma = torch.exp(0.5 * log_variance)

    def combine(prefix: str) -> Tensor:
        names = [f"{prefix}_x", f"{prefix}_m", f"{prefix}_0", *(f"{prefix}_h{k}" for k in range(len(history)))]
        return sum(term(column[name], part) for name, part in zip(names, [state, m, x0, *history], strict=True))

    x_next = combine("c")
    if noise is not None:
        x_next = x_next + column["c_z"] * sigma * noise.to(dtype)
    if extra is not None:
        x_next = x_next + (column["c_e"] + column["c_v"] * sigma * sigma) * extra.to(dtype)
    after = list(history)
    for j in (0, 1) if after else ():
        written, targets = combine(f"g{j}"), expand(torch.from_numpy(program.writes[rows, j]), x)
        after = [torch.where(targets == k, written, h) for k, h in enumerate(after)]
    return x_next, column["s"] * x_next, torch.stack(after) if after else None


def term(coefficient: Tensor, operand: Tensor) -> Tensor:
    """Their product; an operand with coefficient 0 is not read."""
    return torch.where(coefficient == 0, 0.0, coefficient * operand)


def column_names(program: StepProgram) -> list[str]:
    from diffkern.solvers.program import columns

    return list(columns(program.num_slots))


def alphas_cumprod_tables(timesteps: int = 1000) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1−ᾱ) of the linear schedule, float64."""
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, timesteps))
    return torch.from_numpy(np.sqrt(cumulative)), torch.from_numpy(np.sqrt(1 - cumulative))
