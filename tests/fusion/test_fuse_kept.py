"""What is done to a model besides calling it works on a fused one as before, whether it is done before or after."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffkern
from tests.fusion.compare import OPTIONS, Run, assert_close, assert_same, classes, in_float64, relative, run
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
    diffkern.unfuse(model)
    assert [kind.__mro__[1:] for kind in classes(model)] == [kind.__mro__[1:] for kind in classes(plain)]
    assert_same(run(model, inputs()), run(plain, inputs()))
    for m in (model, plain):
        for module in list(m.modules()):
            if nn.utils.parametrize.is_parametrized(module):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert classes(model) == classes(plain) == classes(unet())


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
    model = add_lora(fused(conditional(), **ALL), how) if first == "fuse" else add_lora(conditional(), how)
    fused(model.eval(), **ALL)
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


@pytest.mark.parametrize("first", ["fuse", "cast"])
def test_layerwise_casting(first):
    def cast(model):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        return model

    model = fused(cast(unet()), **ALL) if first == "cast" else cast(fused(unet(), **ALL))
    assert model.up_blocks[0].resnets[0].conv1.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative(model(**inputs()).sample, cast(unet())(**inputs()).sample) <= 2e-5


@pytest.mark.parametrize("first", ["fuse", "offload"])
def test_offloading(first):
    accelerate = pytest.importorskip("accelerate")

    def offload(model):
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    model = fused(offload(unet()), **ALL) if first == "offload" else offload(fused(unet(), **ALL))
    assert model.up_blocks[0].resnets[0].conv1.weight.is_meta
    with torch.no_grad():
        assert relative(model(**inputs()).sample, unet()(**inputs()).sample) <= 2e-5
    assert model.up_blocks[0].resnets[0].conv1.weight.is_meta


@pytest.mark.parametrize("again", [None, "fuse", "remove"])
def test_unfuse_with_hooks_that_hold_the_forward(again):
    accelerate = pytest.importorskip("accelerate")
    model, plain = fused(unet(), **ALL), unet()
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    if again == "fuse":
        fused(model)
    elif again == "remove":
        accelerate.hooks.remove_hook_from_submodules(model)
    diffkern.unfuse(model)
    assert_same(run(model, inputs()), run(plain, inputs()))
    assert_same(in_float64(model, inputs()), in_float64(plain, inputs()))


# --- modes and dtypes


@pytest.mark.parametrize("options", [{}, ALL])
def test_train_and_eval(options):
    model = fused(unet(dropout=0.5), **options)
    expected = in_float64(unet(dropout=0.5), inputs())
    assert relative(model.train()(**inputs()).sample, expected.output) > 0.01
    assert_close(run(model.eval(), inputs()), expected)


@pytest.mark.parametrize("options", [{}, ALL])
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


def test_dropout_draws_the_same_without_concatenations():
    """Attention leaves its result channels last, beside which a skip connection may be contiguous."""
    model = unet(dropout=0.3).train()
    expected = run(model, inputs())
    report = diffkern.fuse(model, virtual_concat=True)
    assert not report.skipped
    assert_close(run(model, inputs()), expected)
