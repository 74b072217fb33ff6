"""Small models of diffusers, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.fusion.compare import randomised

DOWN = ("DownBlock2D", "AttnDownBlock2D")
UP = ("AttnUpBlock2D", "UpBlock2D")


def unet(**settings: Any) -> nn.Module:
    """A `UNet2DModel` of two resolutions, in eval mode."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    defaults = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": DOWN,
        "up_block_types": UP,
        "norm_num_groups": 8,
    }
    return randomised(UNet2DModel(**{**defaults, **settings}))


def conditional(**settings: Any) -> nn.Module:
    """A `UNet2DConditionModel` of two resolutions, in eval mode."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return randomised(UNet2DConditionModel(**{**defaults, **settings}))


def autoencoder(**settings: Any) -> nn.Module:
    """An `AutoencoderKL` that halves once, in eval mode."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    defaults = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return randomised(AutoencoderKL(**{**defaults, **settings}))


def images(n: int = 2, size: int = 16, channels: int = 3, seed: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def inputs(n: int = 2, size: int = 16, channels: int = 3) -> dict[str, Any]:
    """Arguments of `unet`."""
    return {"sample": images(n, size, channels), "timestep": torch.arange(n) * 7 + 3}


def conditional_inputs(n: int = 2, size: int = 8, width: int = 24) -> dict[str, Any]:
    """Arguments of `conditional`."""
    text = torch.randn(n, 5, width, generator=torch.Generator().manual_seed(4))
    return {**inputs(n, size, 4), "encoder_hidden_states": text}
