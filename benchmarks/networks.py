"""The networks of other codebases that `benchmarks.fusion` times, in real sizes and with random weights.

What no package index has is built from the tests' stand-ins, which compute what the originals do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network and the arguments of one evaluation; it returns the tensor of which the training loss is made."""

    what: str
    network: Callable[[], nn.Module]
    arguments: Callable[[], tuple[Any, ...]]
    rounds: int = 9


def output(network: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    found = network(*arguments)
    return found if isinstance(found, Tensor) else found.sample


def ddpm_cifar10(**settings: Any) -> nn.Module:
    """The architecture of google/ddpm-cifar10-32, 35.7 M parameters."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        **settings,
    )


def diffusers_default() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(sample_size=64)


def guided() -> nn.Module:
    """Scale-shift, two blocks a level, attention at 16² and 8²: as ADM's 64² model with a third of its width."""
    from tests.fusion.peers.guided_diffusion import UNetModel

    return UNetModel(
        image_size=64,
        in_channels=3,
        model_channels=64,
        out_channels=6,
        num_res_blocks=2,
        attention_resolutions=(4, 8),
        channel_mult=(1, 2, 3, 4),
        num_head_channels=64,
        use_scale_shift_norm=True,
    )


def lucidrains() -> nn.Module:
    from tests.fusion.peers.lucidrains import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch().Unet(dim=64)


def edm() -> nn.Module:
    from tests.fusion.peers.edm import SongUNet

    return SongUNet(img_resolution=32, in_channels=3, out_channels=3)


def k_diffusion() -> nn.Module:
    from tests.fusion.peers.k_diffusion import image_v1

    return image_v1().ImageDenoiserModelV1(3, 256, [2, 2, 4], [64, 128, 256], [False, False, True])


def own() -> nn.Module:
    from diffkern.models import UNet, UNetConfig

    return UNet(
        UNetConfig(in_channels=3, channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(2,))
    )


def images(n: int, size: int, times: int = 1000) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(n, 3, size, size), torch.randint(0, times, (n,)))


CASES = {
    "ddpm-cifar10": Case("diffusers UNet2DModel, DDPM CIFAR-10, heads of 8, 8×3×32²", ddpm_cifar10, images(8, 32)),
    "ddpm-cifar10 batch 1": Case("the same, 1×3×32²", ddpm_cifar10, images(1, 32), rounds=25),
    "ddpm-cifar10 one head": Case(
        "the same with one head of 256, 8×3×32²", lambda: ddpm_cifar10(attention_head_dim=None), images(8, 32)
    ),
    "diffusers default": Case("diffusers UNet2DModel(), 274 M, 1×3×64²", diffusers_default, images(1, 64)),
    "guided": Case("guided-diffusion UNetModel, scale-shift, 8×3×64²", guided, images(8, 64)),
    "lucidrains": Case("denoising-diffusion-pytorch Unet(64), 4×3×64²", lucidrains, images(4, 64)),
    "edm": Case(
        "EDM SongUNet (DDPM++), 4×3×32²",
        edm,
        lambda: (torch.randn(4, 3, 32, 32), torch.randn(4), None),
    ),
    "k-diffusion": Case(
        "k-diffusion ImageDenoiserModelV1, 8×3×32²", k_diffusion, lambda: (torch.randn(8, 3, 32, 32), torch.rand(8) + 1)
    ),
    "diffkern": Case("diffkern UNet, channels of DDPM CIFAR-10, 8×3×32²", own, images(8, 32)),
}
