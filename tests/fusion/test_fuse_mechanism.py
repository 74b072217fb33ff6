"""What `fuse` recognises, what it leaves alone and says of it, and what it leaves as it was."""

import builtins
import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import diffkern
from diffkern.integrations.fusion import FuseReport, Replaced, Skipped
from tests.fusion.compare import OPTIONS, assert_close, classes, in_float64, run
from tests.fusion.small import autoencoder, conditional, inputs, unet

ALL = OPTIONS[-1]


# --- swapping and back


@pytest.mark.parametrize("make", [unet, conditional, autoencoder])
def test_unfuse_gives_classes_strides_and_values_back(make):
    pytest.importorskip("diffusers")
    model = make()
    kinds, strides = classes(model), [p.stride() for p in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    values = copy.deepcopy(model.state_dict())
    for options in OPTIONS:
        diffkern.fuse(model, **options)
        assert classes(model) != kinds
        assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
        assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind in kinds]
        assert diffkern.unfuse(model) is model
        assert classes(model) == kinds
        assert [p.stride() for p in model.parameters()] == strides
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert diffkern.unfuse(diffkern.unfuse(model)) is model


@pytest.mark.parametrize(("first", "second"), [*itertools.pairwise(OPTIONS), (ALL, {}), (ALL, ALL)])
def test_fuse_again_starts_over(first, second):
    pytest.importorskip("diffusers")
    model, once = unet(), unet()
    again = [diffkern.fuse(model, **options) for options in (first, second)][-1]
    assert again == diffkern.fuse(once, **second)
    assert classes(model) == classes(once)
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in once.parameters()]


def test_a_model_that_was_channels_last_stays_so():
    pytest.importorskip("diffusers")
    model = unet().to(memory_format=torch.channels_last)
    diffkern.fuse(model, **ALL)
    diffkern.unfuse(model)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_a_part_of_a_model_is_fused_and_unfused_by_itself():
    pytest.importorskip("diffusers")
    model = unet()
    before = classes(model)
    diffkern.fuse(model.mid_block)
    assert [a is b for a, b in zip(classes(model), before, strict=True)].count(False) == 3
    diffkern.unfuse(model)
    assert classes(model) == before


def test_a_block_in_two_places_is_fused_once_and_unfused():
    shared = nn.GroupNorm(2, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Conv2d(4, 4, 1)), "c": shared})
    assert len(diffkern.fuse(model).replaced) == 1
    diffkern.unfuse(model)
    assert type(shared) is nn.GroupNorm


def shared(model):
    """The same convolution, norm and parameter in more than one place of a block, and a block in two."""
    first, second = model.up_blocks[0].resnets
    second.conv2 = first.conv2
    middle = model.mid_block.resnets
    middle[1] = middle[0]
    middle[0].norm2 = middle[0].norm1
    model.mid_block.attentions[0].group_norm.weight = middle[0].norm1.weight
    return model


@pytest.mark.parametrize("options", [{}, ALL])
def test_what_a_block_has_twice_keeps_its_values(options):
    pytest.importorskip("diffusers")
    model = shared(unet())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = in_float64(model, inputs())
    diffkern.fuse(model, **options)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert_close(run(model, inputs()), expected)


# --- what fuse leaves as it was


def test_fuse_changes_nothing_else(monkeypatch):
    pytest.importorskip("diffusers")
    model = unet().train()
    model.mid_block.eval()
    model.conv_in.weight.requires_grad_(False)
    model(**inputs()).sample.sum().backward()
    model.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    flags = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hooks = [module._forward_hooks for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("an accelerator was seeded"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: pytest.fail("an accelerator was seeded"))
    torch.default_generator.manual_seed(7)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        report = diffkern.fuse(model, **ALL)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanted
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient is None or torch.equal(p.grad, gradient)
    assert all(module._forward_hooks is own for module, own in zip(model.modules(), hooks, strict=True))
    assert len(report.replaced) > 15


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_fuse_inside_of_contexts(context):
    pytest.importorskip("diffusers")
    model, other = unet(), unet()
    report = diffkern.fuse(other, **ALL)
    with context():
        assert diffkern.fuse(model, **ALL) == report
    assert_close(run(model, inputs()), run(other, inputs()))


@pytest.mark.parametrize("options", [{}, ALL])
def test_a_model_on_the_meta_device_is_fused(options):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = unet_without_values()
    report = diffkern.fuse(model, **options)
    assert not report.skipped
    assert len(report.replaced) >= 13
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(unet().state_dict())
    assert_close(run(model.eval(), inputs()), in_float64(unet(), inputs()))


def unet_without_values():
    from diffusers import UNet2DModel

    return UNet2DModel(**{k: v for k, v in unet().config.items() if not k.startswith("_")})


def test_buffers_of_a_half_precision_model_keep_their_values():
    pytest.importorskip("diffusers")
    model = unet().bfloat16()
    values = copy.deepcopy(model.state_dict())
    diffkern.fuse(model)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


# --- reports and errors


def test_not_a_module():
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDPMPipeline(unet=unet(), scheduler=diffusers.DDPMScheduler())
    for wrong in (pipeline, None, "unet", [nn.GroupNorm(1, 1)]):
        with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module.*{type(wrong).__name__}"):
            diffkern.fuse(wrong)
        with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module.*{type(wrong).__name__}"):
            diffkern.unfuse(wrong)
    with pytest.raises(TypeError):
        diffkern.fuse(nn.GroupNorm(1, 1), True)


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.Sequential(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
)
def test_nothing_known(model):
    report = diffkern.fuse(model)
    assert report.replaced == ()
    assert [left.name for left in report.skipped] == [""]
    assert "nothing" in report.skipped[0].reason
    assert "0 replaced" in str(report)


def test_report_says_what_each_option_did():
    pytest.importorskip("diffusers")
    report = diffkern.fuse(unet(), **ALL)
    effects = [done.effect for done in report.replaced]
    for option in ALL:
        assert any(option in effect for effect in effects)
    assert not report.skipped
    report = diffkern.fuse(nn.GroupNorm(1, 4), **ALL)
    assert [left.reason.partition(":")[0] for left in report.skipped] == sorted(ALL)
    assert [done.effect for done in report.replaced] == ["norm alone"]


def test_report_is_a_dataclass_and_a_table(monkeypatch):
    assert [field.name for field in dataclasses.fields(FuseReport)] == ["replaced", "skipped"]
    done, left = Replaced("a.b", "Block", "all at once", 1e-7), Skipped("c", "Other", "because")
    report = FuseReport((done, done, dataclasses.replace(done, name="d")), (left,))
    assert "Replaced(name='a.b', block='Block', effect='all at once', difference=1e-07)" in repr(report)
    assert dataclasses.asdict(report)["skipped"] == ({"name": "c", "block": "Other", "reason": "because"},)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.replaced = ()
    words = ("3 replaced, 1 left", "replaced 3×", "left 1×", "a.b", "Block", "all at once", "c", "Other", "because")
    pytest.importorskip("rich")
    with_rich = str(report)
    imported = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    without = str(report)
    assert "│" in with_rich
    assert "│" not in without
    for text in (with_rich, without):
        assert all(word in text for word in words)
        assert all(line == line.rstrip() for line in text.splitlines())
