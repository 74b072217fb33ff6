"""Hooks on a fused model are called as often, with the same values, whether they were added before or after."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules import module as nn_module

pytest.importorskip("diffusers")

import diffkern
from tests.fusion.compare import OPTIONS, assert_close, in_float64, run
from tests.fusion.small import inputs, unet

ALL = OPTIONS[-1]


def fused(model, **options):
    diffkern.fuse(model, **options)
    return model


WHERE = {
    "model": "",
    "block": "down_blocks.0.resnets.0",
    "up block": "up_blocks.1",
    "first norm": "up_blocks.0.resnets.0.norm1",
    "second norm": "up_blocks.0.resnets.0.norm2",
    "activation": "up_blocks.0.resnets.0.nonlinearity",
    "attention's norm": "up_blocks.0.attentions.0.group_norm",
    "convolution": "up_blocks.0.resnets.0.conv1",
    "last convolution": "up_blocks.0.resnets.0.conv2",
    "shortcut": "up_blocks.0.resnets.0.conv_shortcut",
    "upsampling": "up_blocks.0.upsamplers.0",
    "upsampling's convolution": "up_blocks.0.upsamplers.0.conv",
    "linear": "up_blocks.0.resnets.0.time_emb_proj",
    "dropout": "up_blocks.0.resnets.0.dropout",
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for element in value for t in tensors(element)] if isinstance(value, tuple | list) else []


def pre_hook(seen):
    return lambda module, arguments, keywords: seen.append(("pre", tensors((arguments, keywords))))


def forward_hook(seen):
    return lambda module, arguments, output: seen.append(("forward", tensors((arguments, output))))


def backward_hook(seen):
    return lambda module, grad_input, grad_output: seen.append(("backward", tensors((grad_input, grad_output))))


def add_hooks(module, seen):
    return [
        module.register_forward_pre_hook(pre_hook(seen), with_kwargs=True),
        module.register_forward_hook(forward_hook(seen)),
        module.register_full_backward_hook(backward_hook(seen)),
    ]


def assert_saw_the_same(mine, theirs):
    assert [kind for kind, _ in mine] == [kind for kind, _ in theirs]
    for (_, some), (_, others) in zip(mine, theirs, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("where", WHERE)
def test_hooks_see_what_they_saw(where):
    plain, expected = unet(), []
    add_hooks(plain.get_submodule(WHERE[where]), expected)
    run(plain, inputs())
    assert expected

    for first, options in (("hooks", {}), ("hooks", ALL), ("fuse", ALL)):
        model, seen = unet(), []
        if first == "fuse":
            fused(model, **options)
        handles = add_hooks(model.get_submodule(WHERE[where]), seen)
        if first == "hooks":
            fused(model, **options)
        run(model, inputs())
        assert_saw_the_same(seen, expected)
        for handle in handles:
            handle.remove()
        model(**inputs())
        assert len(seen) == len(expected)


def test_a_hook_may_replace_the_output():
    def double(module, arguments, output):
        return 2 * output

    for where in ("first norm", "activation", "last convolution", "upsampling's convolution"):
        plain = unet()
        plain.get_submodule(WHERE[where]).register_forward_hook(double)
        model = fused(unet(), **ALL)
        model.get_submodule(WHERE[where]).register_forward_hook(double)
        assert_close(run(model, inputs()), in_float64(plain, inputs()))


@contextmanager
def hooks_of_all(seen):
    handles = [
        nn_module.register_module_forward_hook(lambda module, arguments, output: seen.append(type(module).__name__)),
        nn_module.register_module_forward_pre_hook(lambda module, arguments: seen.append(type(module).__name__)),
    ]
    yield
    for handle in handles:
        handle.remove()


def test_hooks_of_all_modules_are_called():
    model, plain, mine, theirs = unet(), unet(), [], []
    with hooks_of_all(mine):
        fused(model, **ALL)
        assert not mine
        run(model, inputs())
    with hooks_of_all(theirs):
        run(plain, inputs())
    assert [name.removeprefix("Folded") for name in mine] == theirs
