"""Modules of diffusion U-Nets over `diffkern.ops`."""

from diffkern.nn.attention import Attention, QKVOrder
from diffkern.nn.embedding import EmbeddingOrder, sinusoidal_embedding
from diffkern.nn.init import zero_init
from diffkern.nn.norm import GroupNorm
from diffkern.nn.resample import Downsample, Padding, Upsample, upsample_nearest
from diffkern.nn.resblock import ResBlock

__all__ = [
    "Attention",
    "Downsample",
    "EmbeddingOrder",
    "GroupNorm",
    "Padding",
    "QKVOrder",
    "ResBlock",
    "Upsample",
    "sinusoidal_embedding",
    "upsample_nearest",
    "zero_init",
]
