"""Fused models are copied, saved and loaded, in pipelines and averages of weights, as they were before."""

import copy
import io
import pickle
import textwrap

import pytest
import torch

pytest.importorskip("diffusers")

import diffkern
from tests.fusion.compare import OPTIONS, assert_close, assert_same, run
from tests.fusion.small import conditional, conditional_inputs, inputs, unet

ALL = OPTIONS[-1]


def fused(model, **options):
    diffkern.fuse(model, **options)
    return model


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{}, ALL])
def test_copies(how, options):
    model = fused(conditional(), **options)
    expected = run(model, conditional_inputs())
    twin = COPIES[how](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in model.parameters()]
    assert_same(run(twin, conditional_inputs()), expected)
    diffkern.unfuse(twin)
    plain = conditional()
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in plain.parameters()]
    assert_same(run(twin, conditional_inputs()), run(plain, conditional_inputs()))
    assert_same(run(model, conditional_inputs()), expected)


def test_pickle_of_classes_made_while_running():
    model = fused(torch.nn.Sequential(Norm(4, 8), torch.nn.Conv2d(8, 8, 1)))
    assert type(model[0]) is not Norm
    for make in COPIES.values():
        twin = make(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert type(diffkern.unfuse(twin)[0]) is Norm


class Norm(torch.nn.Module):
    """As EDM's, of no class that diffkern could import."""

    def __init__(self, num_groups, num_channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return torch.nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


Norm.__name__ = Norm.__qualname__ = "GroupNorm"
GroupNorm = Norm


def test_other_processes_open_what_was_saved_without_fusing(tmp_path, run_python):
    model = fused(unet(), **ALL)
    model.save_pretrained(tmp_path / "fused")
    torch.save({"model": model, "inputs": inputs()}, tmp_path / "model.pt")
    with torch.no_grad():
        torch.save(model(**inputs()).sample, tmp_path / "expected.pt")
    diffkern.unfuse(model).save_pretrained(tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "fused").iterdir()) == names
    for name in names:
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    run_python(
        textwrap.dedent(f"""
        import sys
        import torch
        from diffusers import UNet2DModel

        sys.modules["diffkern"] = None  # as if it were not installed
        UNet2DModel.from_pretrained({str(tmp_path / "fused")!r})
        del sys.modules["diffkern"]

        torch.set_num_threads({torch.get_num_threads()})
        saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert any(hasattr(type(m), "origin") for m in saved["model"].modules())
        with torch.no_grad():
            got = saved["model"](**saved["inputs"]).sample
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
    """)
    )


def test_from_pretrained_and_from_config_of_a_fused_model(tmp_path):
    model = fused(unet(), **ALL)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(unet())
    assert_close(run(loaded, inputs()), run(model, inputs()))
    assert type(type(model).from_config(model.config)) is type(unet())


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_pipelines(name, tmp_path):
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=50)
    pipeline = getattr(diffusers, f"{name}Pipeline")(unet=unet(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def draw(pipeline):
        return torch.from_numpy(
            pipeline(num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
        )

    expected = draw(pipeline)
    diffkern.fuse(pipeline.unet, **ALL)
    assert torch.allclose(draw(pipeline), expected, rtol=0, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(loaded), expected, rtol=0, atol=1e-4)
    diffkern.unfuse(pipeline.unet)
    assert torch.equal(draw(pipeline), expected)


def test_averaged_weights(tmp_path):
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    averages = []
    for model in (unet(), fused(unet(), **ALL)):
        ema = EMAModel(model.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=model.config)
        for p in model.parameters():
            p.data.mul_(1.5)
        ema.step(model.parameters())
        ema.copy_to(model.parameters())
        ema.save_pretrained(tmp_path / str(len(averages)))
        averages.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))
    loaded = EMAModel.from_pretrained(tmp_path / "1", UNet2DModel)
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, averages[0], strict=True))
