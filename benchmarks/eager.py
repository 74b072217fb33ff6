"""The baselines: what a good user writes with torch.nn.functional, never the formula-style references.

Each takes the same inputs as the op or the loop it stands against and gives the same result to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffkern.nn import GroupNorm
from diffkern.process import GaussianProcess


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if activation == "silu" else y


def channel_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    y = F.normalize(x, dim=1) * weight[:, None, None] * x.shape[1] ** 0.5
    if scale is not None and shift is not None:
        y = y * (scale[:, :, None, None] + 1) + shift[:, :, None, None]
    return F.silu(y) if activation == "silu" else y


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q, k, v (B, T, heads·d), as diffusers calls SDPA."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_qkv(qkv: Tensor, heads: int, *, order: str) -> Tensor:
    """qkv (B, 3·heads·d, T); without its channels side by side SDPA does not take its fused kernel: a copy each."""
    size, part = {"hqkvc": ((heads, 3, -1), 2), "qkvhc": ((3, heads, -1), 1), "hcqkv": ((heads, -1, 3), 3)}[order]
    q, k, v = (x.transpose(2, 3).contiguous() for x in qkv.unflatten(1, size).unbind(part))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


def linear_attention(qkv: Tensor, num_heads: int, *, memory: Tensor, channels_last: bool = False) -> Tensor:
    """Matrix products of views, which here take less time than einsum or as much."""
    rows = qkv.transpose(1, 2) if channels_last else qkv
    q, k, v = rows.unflatten(1, (3, num_heads, -1)).unbind(1)
    keys, values = (m.expand(len(qkv), -1, -1, -1) for m in memory)
    context = torch.cat([keys, k], 3).softmax(3) @ torch.cat([values, v], 3).transpose(2, 3)
    out = (context.transpose(2, 3) @ (q.softmax(2) * q.shape[2] ** -0.5)).flatten(1, 2)
    return out.transpose(1, 2) if channels_last else out


def q_sample(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, noise: Tensor | None = None) -> Tensor:
    """signal, sigma: √ᾱ and √(1−ᾱ) in x0's dtype."""
    noise = torch.randn_like(x0) if noise is None else noise
    return signal[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise


def diffusion_loss(output: Tensor, noise: Tensor) -> Tensor:
    """Per sample, against a stored ε."""
    return F.mse_loss(output, noise, reduction="none").mean((1, 2, 3))


def diffusion_loss_and_grad(
    output: Tensor, noise: Tensor, scale: float, loss_of: Callable[[Tensor, Tensor], Tensor] = diffusion_loss
) -> tuple[Tensor, Tensor]:
    """The loss per sample, and the gradient of scale·Σ of it; output is a leaf."""
    loss = loss_of(output, noise)
    return loss, torch.autograd.grad(scale * loss.sum(), output)[0]


class EagerGroupNorm(nn.GroupNorm):
    """diffkern.nn.GroupNorm's parameters and call, in torch's own operations."""

    activation: str | None

    def forward(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )


def network(model: nn.Module) -> nn.Module:
    """A copy of a diffkern model with the same weights in which no diffkern op is left."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) is GroupNorm:
            module.__class__ = EagerGroupNorm
    return twin


class DDIMStep:
    """x_{t−1} from x_t and ε (Song et al. 2021, eq. 12, η = 0, x0 clipped, or thresholded), with float32 tables."""

    def __init__(self, process: GaussianProcess, steps: int, threshold: tuple[float, float] | None = None) -> None:
        self.threshold = threshold
        self.timesteps = process.spaced(steps)[::-1]
        self.alphas_cumprod = torch.tensor(process.alphas_cumprod, dtype=torch.float32)

    def __call__(self, x: Tensor, eps: Tensor, row: int) -> Tensor:
        alpha = self.alphas_cumprod[self.timesteps[row]]
        last = row + 1 == len(self.timesteps)
        alpha_prev = torch.ones(()) if last else self.alphas_cumprod[self.timesteps[row + 1]]
        x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        if self.threshold is None:
            x0 = x0.clamp(-1, 1)
        else:
            ratio, largest = self.threshold
            s = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(1, largest)[:, None, None, None]
            x0 = x0.clamp(-s, s) / s
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return alpha_prev.sqrt() * x0 + (1 - alpha_prev).sqrt() * eps


class DPMSolver2MStep:
    """A row of DPM-Solver++(2M) but the first and last (Lu et al. 2022, arXiv 2211.01095, algorithm 2, x0 clipped)."""

    def __init__(self, process: GaussianProcess, steps: int) -> None:
        self.alphas_cumprod = [float(process.alphas_cumprod[t]) for t in process.spaced(steps)[::-1]]

    def __call__(self, x: Tensor, eps: Tensor, previous: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """x_{t−1}, and this row's x0, which is the next one's `previous`."""
        last, here, to = (self.alphas_cumprod[row + offset] for offset in (-1, 0, 1))
        h, h_last = _half_log_snr(to) - _half_log_snr(here), _half_log_snr(here) - _half_log_snr(last)
        x0 = ((x - (1 - here) ** 0.5 * eps) / here**0.5).clamp(-1, 1)
        slope = h / (2 * h_last)
        d = (1 + slope) * x0 - slope * previous
        return ((1 - to) / (1 - here)) ** 0.5 * x - to**0.5 * math.expm1(-h) * d, x0


def _half_log_snr(alpha_cumprod: float) -> float:
    return 0.5 * math.log(alpha_cumprod / (1 - alpha_cumprod))


def rescaled_guidance(output: Tensor, scale: float, phi: float) -> Tensor:
    """Classifier-free guidance of [uncond; cond], its deviation brought back towards cond's (Lin et al. 2023)."""
    uncond, cond = output.chunk(2)
    mean = uncond + scale * (cond - uncond)
    dims = tuple(range(1, mean.dim()))
    rescaled = mean * (cond.std(dim=dims, keepdim=True) / mean.std(dim=dims, keepdim=True))
    return phi * rescaled + (1 - phi) * mean


class DDPMStep:
    """The ancestral step (Ho et al. 2020, algorithm 2, σ² = β̃, x0 clipped)."""

    def __init__(self, process: GaussianProcess) -> None:
        self.num_timesteps = process.num_timesteps
        tables = {
            "recip": 1 / process.alphas_cumprod**0.5,
            "recipm1": (1 / process.alphas_cumprod - 1) ** 0.5,
            "of_x0": process.posterior_mean_coef1,
            "of_x": process.posterior_mean_coef2,
            "sigma": process.posterior_variance**0.5,
        }
        self.tables = {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}

    def __call__(self, x: Tensor, eps: Tensor, row: int) -> Tensor:
        t = self.num_timesteps - 1 - row
        c = {name: table[t] for name, table in self.tables.items()}
        x0 = (c["recip"] * x - c["recipm1"] * eps).clamp(-1, 1)
        mean = c["of_x0"] * x0 + c["of_x"] * x
        return mean + c["sigma"] * torch.randn_like(x) if t else mean


class TrainingStep:
    """The same step as diffkern's Trainer: q_sample, network, MSE against ε, clipping, AdamW, running average."""

    def __init__(
        self,
        model: nn.Module,
        process: GaussianProcess,
        batches: Iterator[tuple[Tensor, Tensor]],
        *,
        lr: float,
        grad_clip: float,
        ema_decay: float,
        label_dropout: float,
        null_label: int | None,
    ) -> None:
        """null_label: None for a network without labels."""
        self.model, self.batches = model, batches
        self.device = next(model.parameters()).device
        tables = process.alphas_cumprod**0.5, (1 - process.alphas_cumprod) ** 0.5
        self.signal, self.sigma = (torch.tensor(t, dtype=torch.float32, device=self.device) for t in tables)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.grad_clip, self.label_dropout, self.null_label = grad_clip, label_dropout, null_label

    def __call__(self) -> Tensor:
        """The loss, on the device: nobody waits for it."""
        x0, labels = next(self.batches)
        t = torch.randint(0, len(self.signal), (len(x0),), device=self.device)
        noise = torch.randn_like(x0)
        x_t = q_sample(x0, t, self.signal, self.sigma, noise)
        if self.null_label is None:
            output = self.model(x_t, t)
        else:
            dropped = torch.rand(len(x0), device=self.device) < self.label_dropout
            output = self.model(x_t, t, torch.where(dropped, self.null_label, labels))
        loss = F.mse_loss(output, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        return loss.detach()
