"""Packages installed without all that they import: their networks work, and nothing looks installed that is not."""

import importlib.util
import sys

import pytest
import torch

from tests.fusion.peers import k_diffusion, lucidrains

ABSENT = [*k_diffusion.ABSENT, "pytorch_fid"]


def missing():
    return [package for package in ABSENT if importlib.util.find_spec(package) is None]


@pytest.mark.parametrize("make", [lucidrains.denoising_diffusion_pytorch, k_diffusion.layers, k_diffusion.image_v1])
def test_no_stand_in_is_left(make):
    before = missing()
    assert make() is make()
    assert missing() == before
    assert not [name for name in sys.modules if name.partition(".")[0] in before]


def test_diffusers_does_not_take_a_stand_in_for_torchvision(run_python):
    pytest.importorskip("diffusers")
    lucidrains.denoising_diffusion_pytorch()
    k_diffusion.layers()
    code = """
import importlib.util
from tests.fusion.peers import k_diffusion, lucidrains
installed = importlib.util.find_spec("torchvision") is not None
lucidrains.denoising_diffusion_pytorch()
k_diffusion.image_v1()
import accelerate.utils.imports, diffusers.utils.import_utils as utils
assert utils.is_torchvision_available() == installed
assert bool(accelerate.utils.imports.is_torchvision_available()) == installed
from diffusers import DDPMPipeline, UNet2DModel
"""
    run_python(code)


def test_an_import_that_fails_leaves_nothing(monkeypatch):
    module = "k_diffusion"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(k_diffusion, "ABSENT", k_diffusion.ABSENT[:1])
    with pytest.raises(ModuleNotFoundError):
        k_diffusion.layers()
    assert not [name for name in sys.modules if name.partition(".")[0] in (module, "torchvision")]


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def check_runs(model, *args, **kwargs):
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    out = randomised(model)(x, *args, **kwargs)
    assert out.shape == x.shape
    out.square().mean().backward()
    for grad in (x.grad, *(parameter.grad for parameter in model.parameters())):
        assert grad.isfinite().all()
        assert grad.any()


def test_the_unet_of_denoising_diffusion_pytorch_runs():
    check_runs(lucidrains.denoising_diffusion_pytorch().Unet(16, dim_mults=(1, 2)), torch.tensor([3, 500]))


@pytest.mark.parametrize("mapping_cond_dim", [0, 9])
def test_the_image_denoiser_of_k_diffusion_runs(mapping_cond_dim):
    sizes = {"depths": [1, 2], "channels": [32, 64], "self_attn_depths": [False, True]}
    model = k_diffusion.image_v1().ImageDenoiserModelV1(3, 32, **sizes, mapping_cond_dim=mapping_cond_dim)
    cond = {"mapping_cond": torch.randn(2, mapping_cond_dim)} if mapping_cond_dim else {}
    check_runs(model, torch.tensor([0.5, 2.0]), **cond)
