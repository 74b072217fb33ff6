"""A stand-in for guided-diffusion's noisy classifier: the encoder half of its U-Net with a pooling head."""

from __future__ import annotations

import torch
from torch import nn

from tests.fusion.peers.guided_diffusion import QKVAttention, UNetModel
from tests.fusion.peers.guided_nn import conv_nd, normalization, timestep_embedding, zero_module


class AttentionPool2d(nn.Module):
    """(N, C, H, W) → (N, output_dim): what the mean over the positions gathers by attention from it and from them."""

    def __init__(self, spacial_dim, embed_dim, num_heads_channels, output_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)
        x = x + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[..., 0]


class EncoderUNetModel(nn.Module):
    """The arguments are `UNetModel`'s, without `num_classes`; x → (N, out_channels)."""

    def __init__(self, image_size, in_channels, model_channels, out_channels, *args, dims=2, pool="adaptive", **kwargs):
        super().__init__()
        whole = UNetModel(image_size, in_channels, model_channels, out_channels, *args, dims=dims, **kwargs)
        self.model_channels, self.dtype, self.pool = model_channels, whole.dtype, pool
        self.time_embed, self.input_blocks, self.middle_block = whole.time_embed, whole.input_blocks, whole.middle_block
        ch = self.middle_block[-1].out_channels
        head = [normalization(ch), nn.SiLU()]
        if pool == "adaptive":
            last = zero_module(conv_nd(dims, ch, out_channels, 1))
            self.out = nn.Sequential(*head, nn.AdaptiveAvgPool2d((1, 1)), last, nn.Flatten())
        elif pool == "attention":
            side = image_size // 2 ** (len(whole.channel_mult) - 1)
            self.out = nn.Sequential(*head, AttentionPool2d(side, ch, kwargs["num_head_channels"], out_channels))
        else:
            raise ValueError(f"pool is {pool!r}; the stand-in has 'adaptive' and 'attention'")

    def forward(self, x, timesteps):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x.type(self.dtype)
        for block in self.input_blocks:
            h = block(h, emb)
        return self.out(self.middle_block(h, emb).type(x.dtype))
