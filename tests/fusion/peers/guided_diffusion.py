"""A stand-in for guided-diffusion's U-Net (arXiv 2105.05233), which is in no package index.

Names, attributes, constructor arguments and the order of operations are those that its users' code and checkpoints
rely on; the code is ours. `test_peers_golden` holds it to numbers that the original produced.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.fusion.peers.guided_nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """What `TimestepEmbedSequential` gives the embedding to."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest neighbour, twice the size (of the last two axes, where there are three); then a convolution, if asked."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size (of the two last axes, where there are three) by a strided convolution or by averages."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=1)
        else:
            assert self.out_channels == channels
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.op(x)


class ResBlock(TimestepBlock):
    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        dims=2,
        use_checkpoint=False,
        up=False,
        down=False,
    ):
        super().__init__()
        out = out_channels or channels
        self.channels, self.emb_channels, self.out_channels, self.dropout = channels, emb_channels, out, dropout
        self.use_conv, self.use_checkpoint, self.use_scale_shift_norm = use_conv, use_checkpoint, use_scale_shift_norm

        conv3 = partial(conv_nd, dims, kernel_size=3, padding=1)
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv3(channels, out))
        self.updown = up or down
        resample = partial(Upsample if up else Downsample, channels, False, dims) if self.updown else nn.Identity
        self.h_upd, self.x_upd = resample(), resample()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out * (2 if use_scale_shift_norm else 1)))
        last = zero_module(conv3(out, out))
        self.out_layers = nn.Sequential(normalization(out), nn.SiLU(), nn.Dropout(p=dropout), last)
        if out == channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = conv3(channels, out) if use_conv else conv_nd(dims, channels, out, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        projection = self.emb_layers(emb).type(h.dtype)
        projection = projection.reshape(*projection.shape, *[1] * (h.ndim - 2))
        if self.use_scale_shift_norm:
            scale, shift = projection.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + projection)
        return self.skip_connection(x) + h


def attend(q, k, v):
    """softmax(qᵀk / √d) over the keys, in float32, for q, k, v (heads, d, T)."""
    scale = q.shape[1] ** -0.25
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    return torch.einsum("bts,bcs->bct", weight.float().softmax(dim=-1).type(weight.dtype), v)


class QKVAttentionLegacy(nn.Module):
    """Of a projection (N, 3·C, T) whose channels are [head][q, k, v][channel]."""

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        q, k, v = qkv.reshape(n * self.n_heads, -1, length).chunk(3, dim=1)
        return attend(q, k, v).reshape(n, width // 3, length)


class QKVAttention(QKVAttentionLegacy):
    """Of a projection (N, 3·C, T) whose channels are [q, k, v][head][channel]."""

    def forward(self, qkv):
        n, width, length = qkv.shape
        q, k, v = (part.reshape(n * self.n_heads, -1, length) for part in qkv.chunk(3, dim=1))
        return attend(q, k, v).reshape(n, width // 3, length)


class AttentionBlock(nn.Module):
    """Self-attention over all positions. It is checkpointed whatever `use_checkpoint` says, as the original is."""

    def __init__(
        self, channels, num_heads=1, num_head_channels=-1, use_checkpoint=False, use_new_attention_order=False
    ):
        super().__init__()
        self.channels, self.use_checkpoint = channels, use_checkpoint
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), True)

    def _forward(self, x):
        shape, x = x.shape, x.flatten(2)
        return (x + self.proj_out(self.attention(self.qkv(self.norm(x))))).reshape(shape)


def cast_convolutions(dtype, module):
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


class UNetModel(nn.Module):
    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
    ):
        super().__init__()
        self.image_size, self.model_channels, self.num_classes = image_size, model_channels, num_classes
        self.channel_mult = channel_mult
        self.dtype = torch.float16 if use_fp16 else torch.float32
        emb = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        conditioning = {"dims": dims, "use_checkpoint": use_checkpoint, "use_scale_shift_norm": use_scale_shift_norm}

        def res(channels, out, **updown):
            return ResBlock(channels, emb, dropout, out_channels=out, **conditioning, **updown)

        def attention(channels, heads):
            return AttentionBlock(channels, heads, num_head_channels, use_checkpoint, use_new_attention_order)

        def resample(channels, **updown):
            if resblock_updown:
                return res(channels, channels, **updown)
            return (Upsample if "up" in updown else Downsample)(channels, conv_resample, dims)

        widths = [int(mult * model_channels) for mult in channel_mult]
        ch = widths[0]
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [res(ch, width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(resample(ch, down=True)))
                skips.append(ch)
        self.middle_block = TimestepEmbedSequential(res(ch, ch), attention(ch, num_heads), res(ch, ch))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                layers = [res(ch + skips.pop(), width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and index == num_res_blocks:
                    layers.append(resample(ch, up=True))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        last = zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch), nn.SiLU(), last)

    def _cast(self, dtype):
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            blocks.apply(partial(cast_convolutions, dtype))

    def convert_to_fp16(self):
        """Casts the body's convolutions; `use_fp16` says what the input is cast to."""
        self._cast(torch.float16)

    def convert_to_fp32(self):
        self._cast(torch.float32)

    def forward(self, x, timesteps, y=None):
        assert (y is None) == (self.num_classes is None)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    """Given besides x a smaller image, which is enlarged to x's size and joined to it."""

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, **kwargs)
