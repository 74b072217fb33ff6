"""A stand-in for improved-diffusion's U-Net (arXiv 2102.09672), which is in no package index.

It is the ancestor of guided-diffusion's: a SiLU of its own, residual blocks that do not resample, attention that is
checkpointed only where asked, and an input that is cast to whatever dtype the body has.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.fusion.peers.guided_diffusion import (
    Downsample,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
    attend,
    cast_convolutions,
)
from tests.fusion.peers.guided_nn import checkpoint, conv_nd, normalization, timestep_embedding, zero_module


class SiLU(nn.Module):
    """x · sigmoid(x), of the time before torch had it."""

    def forward(self, x):
        return x * torch.sigmoid(x)


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
    ):
        super().__init__()
        out = out_channels or channels
        self.channels, self.emb_channels, self.out_channels, self.dropout = channels, emb_channels, out, dropout
        self.use_conv, self.use_checkpoint, self.use_scale_shift_norm = use_conv, use_checkpoint, use_scale_shift_norm

        conv3 = partial(conv_nd, dims, kernel_size=3, padding=1)
        self.in_layers = nn.Sequential(normalization(channels), SiLU(), conv3(channels, out))
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(emb_channels, out * (2 if use_scale_shift_norm else 1)))
        last = zero_module(conv3(out, out))
        self.out_layers = nn.Sequential(normalization(out), SiLU(), nn.Dropout(p=dropout), last)
        if out == channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = conv3(channels, out) if use_conv else conv_nd(dims, channels, out, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        h = self.in_layers(x)
        projection = self.emb_layers(emb).type(h.dtype)
        projection = projection.reshape(*projection.shape, *[1] * (h.ndim - 2))
        if self.use_scale_shift_norm:
            scale, shift = projection.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + projection)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Of (N · heads, 3·d, T): the caller splits the heads."""

    def forward(self, qkv):
        return attend(*qkv.chunk(3, dim=1))


class AttentionBlock(nn.Module):
    def __init__(self, channels, num_heads=1, use_checkpoint=False):
        super().__init__()
        self.channels, self.num_heads, self.use_checkpoint = channels, num_heads, use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = QKVAttention()
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        shape, x = x.shape, x.flatten(2)
        qkv = self.qkv(self.norm(x))
        h = self.attention(qkv.reshape(len(x) * self.num_heads, -1, x.shape[2])).reshape(x.shape)
        return (x + self.proj_out(h)).reshape(shape)


class UNetModel(nn.Module):
    def __init__(
        self,
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
        num_heads=1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
    ):
        super().__init__()
        self.model_channels, self.num_classes = model_channels, num_classes
        emb = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        conditioning = {"dims": dims, "use_checkpoint": use_checkpoint, "use_scale_shift_norm": use_scale_shift_norm}

        def stage(channels, out, level, heads):
            layers = [ResBlock(channels, emb, dropout, out_channels=out, **conditioning)]
            if 2**level in attention_resolutions:
                layers.append(AttentionBlock(out, heads, use_checkpoint))
            return layers

        ch = model_channels
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                width = mult * model_channels
                self.input_blocks.append(TimestepEmbedSequential(*stage(ch, width, level, num_heads)))
                ch = width
                skips.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch, conv_resample, dims)))
                skips.append(ch)
        self.middle_block = TimestepEmbedSequential(
            ResBlock(ch, emb, dropout, **conditioning),
            AttentionBlock(ch, num_heads, use_checkpoint),
            ResBlock(ch, emb, dropout, **conditioning),
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
                width = mult * model_channels
                layers = stage(ch + skips.pop(), width, level, heads)
                ch = width
                if level and index == num_res_blocks:
                    layers.append(Upsample(ch, conv_resample, dims))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        last = zero_module(conv_nd(dims, model_channels, out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch), SiLU(), last)

    def _cast(self, dtype):
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            blocks.apply(partial(cast_convolutions, dtype))

    def convert_to_fp16(self):
        self._cast(torch.float16)

    def convert_to_fp32(self):
        self._cast(torch.float32)

    @property
    def inner_dtype(self):
        return next(self.input_blocks.parameters()).dtype

    def forward(self, x, timesteps, y=None):
        assert (y is None) == (self.num_classes is None)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.type(self.inner_dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    """Given besides x a smaller image, which is enlarged to x's size and joined to it."""

    def __init__(self, in_channels, *args, **kwargs):
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, **kwargs)
