"""What is done to a model besides calling it works on a fused one as before, whether it is done before or after."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

pytest.importorskip("diffusers")

import diffkern
from tests.fusion.compare import OPTIONS, Run, assert_close, assert_same, in_float64, relative, run
from tests.fusion.small import conditional, conditional_inputs, images, inputs, unet

ALL = OPTIONS[-1]


def fused(model, **options):
    diffkern.fuse(model, **options)
    return model


def is_fused(model):
    return any(hasattr(type(module), "origin") for module in model.modules())


# --- parameters


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_and_parameters(options):
    model = unet()
    ids = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    fused(model, **options)
    assert [id(p) for p in model.parameters()] == ids
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    other = unet(norm_eps=1e-4)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(values, strict=True)
    assert_close(run(model, inputs()), in_float64(unet(), inputs()))


@pytest.mark.parametrize("options", [{}, ALL])
def test_optimizer_made_before_still_trains_the_model(options):
    model = unet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    fused(model, **options)
    model(**inputs()).sample.square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters() if p.grad.abs().max() > 1e-4)


def test_gradients_that_are_there_already_are_added_to():
    model = unet()
    for _ in range(2):
        model(**inputs()).sample.sum().backward()
        fused(model, **ALL)
    twice = [p.grad.clone() for p in model.parameters()]
    diffkern.unfuse(model).zero_grad()
    assert all(p.grad is None or p.grad.is_contiguous() for p in model.parameters())
    (2 * model(**inputs()).sample).sum().backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    for mine, p in zip(twice, model.parameters(), strict=True):
        assert (mine - p.grad).abs().max() <= 2e-5 * max(p.grad.abs().max(), 1e-4 * largest)


# --- hooks

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


# --- parametrisations and adapters


@pytest.mark.parametrize("first", ["fuse", "norm"])
@pytest.mark.parametrize("options", [{}, ALL])
def test_weight_and_spectral_norm(first, options):
    def reparametrise(model):
        resnet = model.up_blocks[0].resnets[0]
        nn.utils.parametrizations.weight_norm(resnet.conv1)
        nn.utils.parametrizations.weight_norm(resnet.norm1)
        nn.utils.parametrizations.weight_norm(resnet.conv_shortcut)
        nn.utils.parametrizations.weight_norm(model.up_blocks[0].attentions[0].group_norm)
        nn.utils.spectral_norm(resnet.conv2)
        nn.utils.spectral_norm(model.up_blocks[0].upsamplers[0].conv)
        return model

    torch.manual_seed(1)
    plain = reparametrise(unet())
    torch.manual_seed(1)
    model = fused(reparametrise(unet()), **options) if first == "norm" else reparametrise(fused(unet(), **options))
    assert_close(run(model, inputs()), run(plain, inputs()))
    model.train(), plain.train()
    assert_close(run(model, inputs()), run(plain, inputs()))


LORA = ["to_q", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"]


def lora_config():
    return pytest.importorskip("peft").LoraConfig(r=3, target_modules=LORA, init_lora_weights=False)


def add_lora(model, how):
    import peft

    torch.manual_seed(5)
    if how == "get_peft_model":
        return peft.get_peft_model(model, lora_config())
    if how == "inject":
        return peft.inject_adapter_in_model(lora_config(), model)
    model.add_adapter(lora_config())
    return model


@pytest.mark.parametrize("first", ["fuse", "adapter"])
@pytest.mark.parametrize("how", ["get_peft_model", "inject", "add_adapter"])
def test_lora(first, how):
    lora_config()
    plain = add_lora(conditional(), how).eval()
    for options in ({}, ALL):
        model = add_lora(fused(conditional(), **options), how) if first == "fuse" else add_lora(conditional(), how)
        fused(model.eval(), **options)
        got = run(model, conditional_inputs())
        assert_close(got, in_float64(plain, conditional_inputs()), unfused=run(plain, conditional_inputs()))
        assert any("lora_B" in name and g is not None for name, g in got.gradients.items())


def test_lora_merged_and_unmerged():
    lora_config()
    plain, model = add_lora(unet(), "get_peft_model").eval(), add_lora(fused(unet(), **ALL), "get_peft_model").eval()
    for change in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        plain, model = getattr(plain, change)() or plain, getattr(model, change)() or model
        assert relative(model(**inputs()).sample, plain(**inputs()).sample) <= 2e-5
    assert relative(model(**inputs()).sample, unet()(**inputs()).sample) > 1e-3


# --- modes and dtypes


@pytest.mark.parametrize("options", [{}, ALL])
def test_train_and_eval(options):
    model = fused(unet(dropout=0.5), **options)
    expected = in_float64(unet(dropout=0.5), inputs())
    assert relative(model.train()(**inputs()).sample, expected.output) > 0.01
    assert_close(run(model.eval(), inputs()), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("build", [(unet, inputs), (conditional, conditional_inputs)], ids=["unet", "conditional"])
def test_gradient_checkpointing(options, build):
    make, arguments = build
    plain, model = make().train(), fused(make().train(), **options)
    model.enable_gradient_checkpointing()
    calls = []
    model.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    assert_close(run(model, arguments()), in_float64(plain, arguments()))
    assert len(calls) == 2
    model.disable_gradient_checkpointing()
    assert_close(run(model, arguments()), in_float64(plain, arguments()))
    assert len(calls) == 3


@pytest.mark.parametrize("options", [{}, {"virtual_concat": True}])
def test_float64_runs_as_before_bit_for_bit(options):
    assert_same(in_float64(fused(unet(), **options), inputs()), in_float64(unet(), inputs()))


@pytest.mark.parametrize("options", [{}, ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_before(options, dtype):
    def narrow():
        return {"sample": images().to(dtype), "timestep": 10}

    exact = in_float64(unet(), {"sample": images().to(dtype).float(), "timestep": 10})
    before = run(unet().to(dtype), narrow())
    model = fused(unet(), **options).to(dtype)
    for got in (run(model, narrow()), run(fused(unet().to(dtype), **options), narrow())):
        assert got.output.dtype == dtype
        assert_as_near(got, before, exact)
    assert_close(run(model.float(), inputs()), run(diffkern.unfuse(model), inputs()))


def assert_as_near(got: Run, before: Run, exact: Run) -> None:
    """Root mean square errors, as single rounding errors go one way or the other; the gradients' all together."""

    def off(a: Run) -> tuple[float, float]:
        output = (a.output.double() - exact.output).square().mean().sqrt()
        gradient = sum((g.double() - exact.gradients[name]).square().sum() for name, g in a.gradients.items())
        return float(output), float(gradient) ** 0.5

    for mine, theirs in zip(off(got), off(before), strict=True):
        assert mine <= 1.2 * theirs


@pytest.mark.parametrize("options", [{}, ALL])
def test_autocast(options):
    model, exact = unet(), in_float64(unet(), inputs())

    def call(**arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**arguments)

    before = run(model, inputs(), call)
    dtypes = []
    handle = model.up_blocks[0].resnets[0].register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    run(model, inputs(), call)
    fused(model, **options)
    after = run(model, inputs(), call)
    handle.remove()
    assert after.output.dtype == before.output.dtype
    if not options.get("virtual_concat"):
        assert dtypes[0] == dtypes[1]
    assert_as_near(run(model, inputs(), call), before, exact)
