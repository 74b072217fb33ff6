"""`fuse` on the networks of k-diffusion: another way to compute the same."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffkern.integrations.fusion import fuse, unfuse
from tests.fusion.checks import assert_bitwise, assert_same, distance, images, randomised, recorded, results, trained
from tests.fusion.golden import relative
from tests.fusion.peers import k_diffusion

SIGMAS = torch.tensor([0.3, 20.0])


def network(**settings):
    default = {"c_in": 3, "feats_in": 12, "depths": [1, 2], "channels": [32, 64], "self_attn_depths": [False, True]}
    return randomised(k_diffusion.image_v1().ImageDenoiserModelV1(**default | settings))


def block(c_in=8, c_out=8, **settings):
    made = k_diffusion.image_v1().ResConvBlock(12, c_in, 12, c_out, **{"group_size": 4} | settings)
    return randomised(made)


def cond(n=2):
    return {"cond": images(n, 12, seed=5)}


def fused(model):
    report = fuse(model := copy.deepcopy(model))
    assert not report.skipped
    return model


class Chain(nn.Module):
    """Two blocks after each other, of which the second has no convolution in its shortcut."""

    def __init__(self, **settings):
        super().__init__()
        self.first, self.second = block(8, 16, **settings), block(16, 16, **settings)

    def forward(self, x, cond):
        return self.second(self.first(x, cond), cond)


NETWORKS = {
    "default": {},
    "three levels": {"depths": [1, 1, 2], "channels": [32, 48, 64], "self_attn_depths": [False, True, False]},
    "dropout": {"dropout_rate": 0.3},
    "patches": {"patch_size": 2, "has_variance": True},
    "one image channel": {"c_in": 1, "channels": [16, 96]},
    "mapping": {"mapping_cond_dim": 5, "unet_cond_dim": 2},
    "cross attention": {"cross_attn_depths": [False, True], "cross_cond_dim": 6},
}


def conditions(settings):
    found = {}
    if "mapping_cond_dim" in settings:
        found |= {"mapping_cond": images(2, 5, seed=6), "unet_cond": images(2, 2, 8, 8, seed=7)}
    if "cross_cond_dim" in settings:
        found |= {"cross_cond": images(2, 4, 6, seed=6), "cross_cond_padding": torch.zeros(2, 4)}
    return found


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_network(settings, training):
    model = network(**settings).train(training)
    x = images(2, model.c_in, 8, 8)
    found = results(fused(model), x, SIGMAS, **conditions(settings))
    assert_same(found, results(model, x, SIGMAS, **conditions(settings)))


@pytest.mark.parametrize(
    "x",
    [
        images(1, 8, 8, 8),
        images(2, 8, 5, 3),
        images(2, 8, 6, 6).to(memory_format=torch.channels_last),
        images(2, 8, 10, 18)[..., 1:-1, 2::2],
    ],
    ids=["batch 1", "odd", "channels last", "strided"],
)
@pytest.mark.parametrize("c_out", [8, 16])
def test_block(x, c_out):
    model, before = block(8, c_out).eval(), x.clone()
    same = fused(model)
    found, expected = results(same, x, cond(len(x))), results(model, x, cond(len(x)))
    assert_same(found, expected)
    assert found["out"].stride() == expected["out"].stride()
    with torch.no_grad():
        same(x, cond(len(x)))
    assert torch.equal(x, before)


def test_channels_last_weights():
    model, x = network(), images(2, 3, 8, 8)
    same = copy.deepcopy(model)
    fuse(same, channels_last=True)
    assert_same(results(same, x, SIGMAS), results(model, x, SIGMAS))


def test_everything_is_fused():
    report = fuse(network())
    kinds = [done.block for done in report.replaced]
    assert {kind: kinds.count(kind) for kind in kinds} == {"ResConvBlock": 6, "SelfAttention2d": 4, "AdaGN": 16}


def test_a_network_in_its_preconditioner():
    denoiser = k_diffusion.layers().Denoiser(network(), sigma_data=0.5)
    x = images(2, 3, 8, 8)
    assert_same(results(fused(denoiser), x, SIGMAS), results(denoiser, x, SIGMAS))


def test_levels_taken_away_after_fusing():
    model = network(depths=[1, 1, 1], channels=[32, 48, 64], self_attn_depths=[False] * 3)
    same, x = fused(model), images(2, 3, 8, 8)
    for net in (model, same):
        net.set_skip_stages(1)
        randomised(net)
    assert_same(results(same, x, SIGMAS), results(model, x, SIGMAS))


def test_a_condition_that_all_images_share():
    norm = randomised(k_diffusion.layers().AdaGN(12, 8, 2))
    x = images(3, 8, 4, 4)
    assert_same(results(fused(norm), x, cond(1)), results(norm, x, cond(1)))


def test_an_adagn_of_another_key_and_eps():
    norm = randomised(k_diffusion.layers().AdaGN(12, 8, 2, eps=0.1, cond_key="other"))
    x, both = images(3, 8, 4, 4), {"cond": images(3, 7), "other": images(3, 12)}
    assert_same(results(fused(norm), x, both), results(norm, x, both))


def test_an_adagn_in_float32_of_a_16_bit_image():
    norm, x = randomised(k_diffusion.layers().AdaGN(12, 8, 2)), images(3, 8, 4, 4)
    ours, theirs, exact = fused(norm)(x.bfloat16(), cond(3)), norm(x.bfloat16(), cond(3)), norm(x, cond(3))
    assert ours.dtype == theirs.dtype == torch.float32
    assert distance(ours, exact) <= distance(theirs, exact)


def test_a_conditioned_skip_is_given_the_condition():
    layers = k_diffusion.layers()
    main = [layers.AdaGN(12, 8, 2), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)]
    model = randomised(layers.ConditionedResidualBlock(*main, skip=layers.AdaGN(12, 8, 4)))
    x = images(2, 8, 5, 5)
    assert_same(results(fused(model), x, cond()), results(model, x, cond()))


class KeepsItsOutput(nn.Module):
    def forward(self, x):
        self.kept = x
        return x


def test_the_residual_is_added_in_place_where_nobody_else_has_the_output(monkeypatch):
    model, x = fused(block()), images(2, 8, 5, 7)
    written, add = [], torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, other: written.append(self.data_ptr()) or add(self, other))
    assert written == [model(x, cond()).data_ptr()]

    for module in (model.main, model.main[-1], model.main[-2]):
        handle = module.register_forward_hook(lambda *_: None)
        model(x, cond())
        handle.remove()
    model.main[-1] = KeepsItsOutput()
    out = model(x, cond())
    assert len(written) == 1
    assert torch.equal(out, model.main[-1].kept + x)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_in_training(inplace):
    model = block(dropout_rate=0.4).train()
    model.main[3].inplace = model.main[-1].inplace = inplace
    x = images(2, 8, 5, 7)
    assert_same(results(fused(model), x, cond()), results(model, x, cond()))


def test_training_steps():
    model, x = network(dropout_rate=0.1), images(2, 3, 8, 8)
    assert_same(trained(fused(model), x, SIGMAS), trained(model, x, SIGMAS))


def test_unfuse_is_bitwise():
    model, x = network(), images(2, 3, 8, 8)
    expected, kinds = results(model, x, SIGMAS), [type(m) for m in model.modules()]
    fuse(model)
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert_bitwise(results(model, x, SIGMAS), expected)


KINDS = ("AdaGN", "Conv2d", "Dropout2d", "GELU", "Linear", "ConditionedSequential", "Identity", "ResConvBlock")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kinds", [KINDS, *[(kind,) for kind in KINDS]], ids="-".join)
def test_hooks_are_called_with_what_they_saw(when, kinds):
    net, x = Chain(), images(2, 8, 5, 7)
    expected = recorded(net, x, cond(), kinds=kinds)
    if when == "after":
        fuse(net)
    seen = recorded(net, x, cond(), kinds=kinds, then=fuse if when == "before" else None)
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert all(relative(a, b) <= 2e-5 for (_, a), (_, b) in zip(seen, expected, strict=True))


def test_state_dict_is_unchanged():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    fuse(model)
    after = model.state_dict()
    assert_bitwise(after, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    network().load_state_dict(after, strict=True)
    model.load_state_dict(before, strict=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model, x = fused(Chain()), images(2, 8, 5, 7)
    same = copied(model)
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    expected = results(model, x, cond())
    assert_bitwise(results(same, x, cond()), expected)
    unfuse(same)
    assert_bitwise(results(model, x, cond()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x, features = Chain().eval(), images(2, 8, 5, 7), cond()["cond"]
    half, same, exact = copy.deepcopy(model).to(dtype), fused(model).to(dtype), model(x, {"cond": features})
    out, expected = (net(x.to(dtype), {"cond": features.to(dtype)}) for net in (same, half))
    assert out.dtype == expected.dtype
    assert distance(out, exact) <= 1.05 * distance(expected, exact)


def test_autocast():
    model, x = Chain().eval(), images(2, 8, 5, 7)
    same, exact = fused(model), model(x, cond())
    seen, expected = [], []
    for net, dtypes in ((same, seen), (model, expected)):
        for module in net.modules():
            if type(module).__name__ in ("AdaGN", "ResConvBlock"):
                module.register_forward_hook(lambda m, i, output, dtypes=dtypes: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = same(x, cond()), model(x, cond())
    assert ours.dtype == theirs.dtype
    assert seen == expected
    assert distance(ours, exact) <= 1.05 * distance(theirs, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    class Checkpointed(Chain):
        def forward(self, x, cond):
            x = checkpoint(self.first, x, cond, use_reentrant=use_reentrant)
            return checkpoint(self.second, x, cond, use_reentrant=use_reentrant)

    model, x = Checkpointed(dropout_rate=0.2), images(2, 8, 5, 7)
    assert_same(results(fused(model), x, cond()), results(model, x, cond()))


@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(training):
    torch.compiler.reset()
    model, x = fused(Chain()).train(training), images(2, 8, 5, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {key.replace("_orig_mod.", ""): value for key, value in results(compiled, x, cond()).items()}
    assert_same(found, results(model, x, cond()))
