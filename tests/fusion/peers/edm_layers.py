"""The layers of the stand-in for EDM's networks: they cast their parameters to their input's dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.fusion.peers.persistence import persistent_class


def initial(mode, shape, fan_in, fan_out):
    """A random tensor: xavier or kaiming, uniform or normal."""
    fan = (fan_in + fan_out) / 2 if mode.startswith("xavier") else fan_in
    if mode.endswith("uniform"):
        return math.sqrt(3 / fan) * (torch.rand(shape) * 2 - 1)
    return torch.randn(shape) / math.sqrt(fan)


@persistent_class
class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias=True, init_mode="kaiming_normal", init_weight=1, init_bias=0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        fans = in_features, out_features
        self.weight = nn.Parameter(initial(init_mode, [out_features, in_features], *fans) * init_weight)
        self.bias = nn.Parameter(initial(init_mode, [out_features], *fans) * init_bias) if bias else None

    def forward(self, x):
        x = x @ self.weight.to(x.dtype).t()
        return x if self.bias is None else x.add_(self.bias.to(x.dtype))


@persistent_class
class Conv2d(nn.Module):
    """A convolution, after a 2× resampling with a separable filter; `kernel` 0 leaves the resampling alone."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel,
        bias=True,
        up=False,
        down=False,
        resample_filter=(1, 1),
        fused_resample=False,
        init_mode="kaiming_normal",
        init_weight=1,
        init_bias=0,
    ):
        super().__init__()
        assert not (up and down)
        self.in_channels, self.out_channels, self.up, self.down = in_channels, out_channels, up, down
        self.fused_resample = fused_resample
        self.weight = self.bias = None
        if kernel:
            shape = [out_channels, in_channels, kernel, kernel]
            fans = in_channels * kernel**2, out_channels * kernel**2
            self.weight = nn.Parameter(initial(init_mode, shape, *fans) * init_weight)
            self.bias = nn.Parameter(initial(init_mode, [out_channels], *fans) * init_bias) if bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        kernel_2d = (taps.outer(taps) / taps.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", kernel_2d if up or down else None)

    def _resample(self, x, channels, padding):
        taps = self.resample_filter.to(x.dtype).tile([channels, 1, 1, 1])
        if self.up:
            return F.conv_transpose2d(x, taps * 4, groups=channels, stride=2, padding=padding)
        return F.conv2d(x, taps, groups=channels, stride=2, padding=padding)

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        own = 0 if weight is None else weight.shape[-1] // 2
        others = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.fused_resample and self.up and weight is not None:
            x = self._resample(x, self.in_channels, max(others - own, 0))
            x = F.conv2d(x, weight, padding=max(own - others, 0))
        elif self.fused_resample and self.down and weight is not None:
            x = self._resample(F.conv2d(x, weight, padding=own + others), self.out_channels, 0)
        else:
            if self.up or self.down:
                x = self._resample(x, self.in_channels, others)
            if weight is not None:
                x = F.conv2d(x, weight, padding=own)
        return x if self.bias is None else x.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


@persistent_class
class GroupNorm(nn.Module):
    def __init__(self, num_channels, num_groups=32, min_channels_per_group=4, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = min(num_groups, num_channels // min_channels_per_group), eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class AttentionOp(torch.autograd.Function):
    """softmax(qᵀk / √C) over the keys in float32, for q, k (N, C, T); returns (N, T, T) of q's dtype."""

    @staticmethod
    def forward(ctx, q, k):
        logits = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float())
        w = logits.softmax(dim=2).to(q.dtype)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, grad):
        q, k, w = (tensor.float() for tensor in ctx.saved_tensors)
        grad = grad.float()
        of_logits = w * (grad - (w * grad).sum(dim=2, keepdim=True)) / math.sqrt(k.shape[1])
        dq, dk = torch.einsum("nck,nqk->ncq", k, of_logits), torch.einsum("ncq,nqk->nck", q, of_logits)
        return dq.to(ctx.saved_tensors[0].dtype), dk.to(ctx.saved_tensors[1].dtype)


@persistent_class
class PositionalEmbedding(nn.Module):
    """(N,) → (N, num_channels): cosines, then sines; `endpoint` makes the lowest frequency 1 / max_positions."""

    def __init__(self, num_channels, max_positions=10000, endpoint=False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - bool(self.endpoint))
        angles = x.outer(((1 / self.max_positions) ** exponents).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@persistent_class
class FourierEmbedding(nn.Module):
    def __init__(self, num_channels, scale=16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x):
        angles = x.outer((2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)
