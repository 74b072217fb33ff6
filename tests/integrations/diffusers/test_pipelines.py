"""diffusers' own pipelines with our scheduler in them: the same images, and saved and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.integrations.diffusers.cases import diffusers, ours, pair

PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    made = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    # Without training a sampler amplifies rounding without bound, diffusers' own too; with small outputs it does not.
    torch.nn.init.normal_(made.conv_out.weight, std=0.003)
    return made


def images(name, unet, scheduler, generator, **kwargs):
    pipeline = getattr(diffusers, PIPELINES[name])(unet=unet, scheduler=getattr(diffusers, name)())
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=2, generator=generator, output_type="np", **kwargs).images


def seeded(kind):
    if kind == "one":
        return torch.Generator().manual_seed(3)
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


@pytest.mark.parametrize("kind", ["one", "list"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("DDPMScheduler", {"num_inference_steps": 40}),
        ("DDIMScheduler", {"num_inference_steps": 10, "eta": 0.0}),
        ("DDIMScheduler", {"num_inference_steps": 20, "eta": 0.7, "use_clipped_model_output": True}),
    ],
    ids=str,
)
def test_same_images(unet, name, kwargs, kind):
    mine = images(name, unet, getattr(ours, name)(), seeded(kind), **kwargs)
    theirs = images(name, unet, getattr(diffusers, name)(), seeded(kind), **kwargs)
    assert theirs.std() > 0.1
    assert np.abs(mine - theirs).max() < 1e-5


def test_save_and_load_a_pipeline(unet, tmp_path):
    scheduler = ours.DDPMScheduler(variance_type="fixed_large", noise="philox")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffkern.integrations.diffusers", "DDPMScheduler"]
    assert "noise" not in json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is ours.DDPMScheduler
    assert loaded.scheduler.config.variance_type == "fixed_large"
    # diffusers imports no module that it does not know: a fresh process has to.
    code = "import diffusers, diffkern.integrations.diffusers, sys; "
    code += "print(type(diffusers.DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler))"
    fresh = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "diffkern.integrations.diffusers.DDPMScheduler" in fresh.stdout
    swapped = diffusers.DDPMPipeline.from_pretrained(tmp_path, scheduler=ours.DDPMScheduler(beta_end=0.01))
    assert swapped.scheduler.config.beta_end == 0.01


def test_ddim_pipeline_makes_any_scheduler_its_own(unet):
    """Which is why docs/diffusers.md says to assign ours afterwards."""
    pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=ours.DDIMScheduler())
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    pipeline.scheduler = ours.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert type(pipeline.scheduler) is ours.DDIMScheduler


def test_image_to_image(unet):
    """The loop of the image-to-image pipelines: noise to a strength, then the steps that are left."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(20)
        timesteps = scheduler.timesteps[12:]
        x = scheduler.add_noise(x0, noise, timesteps[:1].repeat(2))
        with torch.no_grad():
            for t in timesteps:
                x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        results.append(x)
    assert (results[0] - results[1]).abs().max() < 1e-5
