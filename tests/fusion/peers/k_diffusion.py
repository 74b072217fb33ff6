"""k-diffusion, installed without the packages of its data, metrics and SDE samplers, which its networks do not use."""

from __future__ import annotations

from tests.fusion.peers.absent import import_without

ABSENT = ["torchvision", "dctorch", "clip", "cleanfid", "skimage", "jsonmerge", "torchdiffeq", "torchsde"]


def imported(name):
    needs = ["einops", "scipy.integrate", "PIL.Image", "tqdm.auto", "safetensors", "torch._dynamo"]
    return import_without(name, needs=needs, absent=ABSENT)


def layers():
    """`k_diffusion.layers`; skips the test where k-diffusion is not installed."""
    return imported("k_diffusion.layers")


def image_v1():
    """`k_diffusion.models.image_v1`; skips the test where k-diffusion is not installed."""
    return imported("k_diffusion.models.image_v1")
