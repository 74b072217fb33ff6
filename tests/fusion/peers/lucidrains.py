"""denoising-diffusion-pytorch, installed without torchvision and pytorch-fid, which its networks do not use."""

from __future__ import annotations

from tests.fusion.peers.absent import import_without


def imported(name):
    """The module `name` of the package; skips the test where that is not installed."""
    return import_without(
        f"denoising_diffusion_pytorch.{name}",
        needs=["einops", "scipy.optimize", "PIL.Image", "tqdm.auto", "accelerate", "ema_pytorch"],
        absent=["torchvision", "pytorch_fid"],
    )


def denoising_diffusion_pytorch():
    """Its module of `Unet` and `GaussianDiffusion`; skips the test where it is not installed."""
    return imported("denoising_diffusion_pytorch")
