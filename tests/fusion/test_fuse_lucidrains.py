"""`fuse` on the networks of denoising-diffusion-pytorch: another way to compute the same."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffkern.integrations.fusion import fuse, unfuse
from tests.fusion import golden
from tests.fusion.checks import assert_bitwise, assert_same, distance, images, randomised, recorded, results, trained
from tests.fusion.peers import lucidrains

TIMES = torch.tensor([0.25, 3.5])  # of which also the random features' many-fold are small: sines to full accuracy


def unet(**settings):
    return randomised(lucidrains.denoising_diffusion_pytorch().Unet(**{"dim": 8, "dim_mults": (1, 2)} | settings))


def block(dim=8, dim_out=12, **settings):
    made = lucidrains.denoising_diffusion_pytorch().ResnetBlock(dim, dim_out, time_emb_dim=16, **settings)
    return randomised(made)


def fused(model):
    report = fuse(model := copy.deepcopy(model))
    assert not report.skipped
    return model


UNETS = {
    "default": {},
    "odd widths": {"dim": 6, "init_dim": 10, "out_dim": 5, "dim_mults": (1, 3), "channels": 1},
    "one stage": {"dim_mults": (2,), "attn_heads": 1, "attn_dim_head": 5},
    "three stages": {"dim_mults": (1, 2, 3), "full_attn": (False, True, True), "attn_heads": (1, 2, 3)},
    "self-conditioned": {"self_condition": True},
    "learned variance": {"learned_variance": True},
    "random features": {"random_fourier_features": True},
    "learned features": {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.parametrize("settings", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("training", [False, True])
def test_unet(settings, training):
    model = unet(**settings).train(training)
    x = images(2, model.channels, 8, 12)
    assert_same(results(fused(model), x, TIMES), results(model, x, TIMES))


@pytest.mark.parametrize(
    "x",
    [
        images(1, 3, 8, 8),
        images(2, 3, 2, 6),
        images(2, 3, 8, 8).to(memory_format=torch.channels_last),
        images(2, 3, 10, 18)[..., 1:-1, 2::2],
    ],
    ids=["batch 1", "two rows", "channels last", "strided"],
)
def test_inputs(x):
    model = unet()
    found, expected = results(fused(model), x, TIMES[: len(x)]), results(model, x, TIMES[: len(x)])
    assert_same(found, expected)
    assert found["out"].stride() == expected["out"].stride()


def test_self_condition_is_passed_on():
    model, x, x_self_cond = unet(self_condition=True), images(2, 3, 8, 8), images(2, 3, 8, 8, seed=3)
    assert_same(results(fused(model), x, TIMES, x_self_cond), results(model, x, TIMES, x_self_cond))


def test_with_options():
    model, x = unet(dim_mults=(1, 2, 3)), images(2, 3, 64, 64)
    same = copy.deepcopy(model)
    report = fuse(same, channels_last=True, fold_upsample=True)
    assert any("fold_upsample" in done.effect for done in report.replaced)
    assert_same(results(same, x, TIMES), results(model, x, TIMES))


def test_of_the_default_size():
    model = unet(dim=64, dim_mults=(1, 2, 4, 8))
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x, TIMES[:1])
        report = fuse(model)
        assert golden.relative(model(x, TIMES[:1]), expected) <= 2e-5
    kinds = [done.block for done in report.replaced]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"ResnetBlock": 19, "Block": 38, "RMSNorm": 12, "Attention": 3}


def test_golden():
    model = golden.build("lucid_base")
    fuse(model)
    golden.check_against_golden(model, "lucid_base")


def test_unet_of_one_dimension():
    model = randomised(lucidrains.imported("denoising_diffusion_pytorch_1d").Unet1D(8, dim_mults=(1, 2), channels=3))
    x = images(2, 3, 20)
    assert_same(results(fused(model), x, TIMES), results(model, x, TIMES))


@pytest.mark.parametrize("cond_drop_prob", [0.0, 0.5])
def test_unet_of_classifier_free_guidance(cond_drop_prob):
    module = lucidrains.imported("classifier_free_guidance")
    model = randomised(module.Unet(8, num_classes=4, dim_mults=(1, 2), cond_drop_prob=cond_drop_prob))
    x, classes = images(2, 3, 8, 8), torch.tensor([0, 3])
    assert_same(results(fused(model), x, TIMES, classes), results(model, x, TIMES, classes))


@pytest.mark.parametrize("dim", [3, 4, 6, 7])
def test_blocks_whose_norms_multiply_by_the_width_are_left_alone(dim):
    """By its square root, not by that of the channels: only trying them tells, and only where the two differ."""
    model = randomised(lucidrains.imported("guided_diffusion").ResnetBlock(8, dim, time_emb_dim=16))
    same, x, t = copy.deepcopy(model), images(2, 8, 5, 5), images(2, 16)
    report = fuse(same)
    assert_same(results(same, x, t), results(model, x, t))
    assert [done.block for done in report.replaced] == ["ResnetBlock"]
    assert {left.block for left in report.skipped} == {"Block", "RMSNorm"}


def test_uvit_whose_norms_are_over_other_axes_too():
    module = lucidrains.imported("simple_diffusion")
    model = randomised(module.UViT(8, dim_mults=(1, 2), vit_depth=1, vit_dropout=0.0))
    x = images(2, 3, 16, 16)
    same = fused(model)
    assert_same(results(same, x, TIMES), results(model, x, TIMES))
    norms = [m for m in same.modules() if type(m).__name__ == "RMSNorm"]
    assert {m.normalize_dim for m in norms if hasattr(m, "origin")} == {1}
    assert {m.normalize_dim for m in norms if not hasattr(m, "origin")} >= {2}


def test_karras_unet_is_left_alone():
    karras = lucidrains.imported("karras_unet").KarrasUnet(
        image_size=8, dim=8, dim_max=16, num_downsamples=1, num_blocks_per_stage=1, attn_res=(4,)
    )
    assert fuse(karras).replaced == ()


class OlderBlock(nn.Module):
    """Of the releases with a GroupNorm."""

    def __init__(self, dim, dim_out, groups=4):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)
        self.act = nn.SiLU()

    def forward(self, x, scale_shift=None):
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.act(x)


class OlderResnetBlock(nn.Module):
    """Of the releases that add the time embedding, or scale and shift by it, between halves with a GroupNorm."""

    def __init__(self, dim, dim_out, adds):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(16, dim_out if adds else 2 * dim_out))
        self.block1, self.block2 = Block(dim, dim_out), Block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()
        self.adds = adds

    def forward(self, x, time_emb=None):
        t = self.mlp(time_emb)[:, :, None, None]
        h = self.block1(x) + t if self.adds else self.block1(x, scale_shift=t.chunk(2, dim=1))
        return self.block2(h) + self.res_conv(x)


Block = type("Block", (OlderBlock,), {"__module__": __name__})
ResnetBlock = type("ResnetBlock", (OlderResnetBlock,), {"__module__": __name__})


@pytest.mark.parametrize("adds", [False, True])
def test_blocks_of_forks_with_a_group_norm(adds):
    model = randomised(ResnetBlock(8, 12, adds))
    same, x, t = copy.deepcopy(model), images(2, 8, 5, 7), images(2, 16)
    report = fuse(same)
    assert [done.block for done in report.replaced] == ["Block", "Block", *([] if adds else ["ResnetBlock"])]
    assert_same(results(same, x, t), results(model, x, t))


def test_a_block_that_computes_something_else_is_left_alone():
    class Block(OlderBlock):
        def forward(self, x, scale_shift=None):
            return 1.001 * super().forward(x, scale_shift)

    model = randomised(Block(8, 12))
    x = images(2, 8, 5, 7)
    expected = results(model, x)
    report = fuse(model)
    assert [left.block for left in report.skipped] == ["Block"]
    assert type(model) is Block
    assert_same(results(model, x), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dims", [(8, 12), (8, 8)])
@pytest.mark.parametrize("embedding", [images(2, 16), None], ids=["embedding", "none"])
def test_block(training, dims, embedding):
    """Alone; and the input, to which nothing may be added, stays as it is."""
    model = block(*dims, dropout=0.5).train(training)
    model.block2.dropout.p = 0.5
    x, same = images(2, 8, 5, 7), fused(model)
    before = x.clone()
    assert_same(results(same, x, embedding), results(model, x, embedding))
    with torch.no_grad():
        same(x, embedding)
    assert torch.equal(x, before)


def test_the_residual_is_added_in_place_where_nobody_else_has_the_output(monkeypatch):
    model, x, t = fused(block()), images(2, 8, 5, 7), images(2, 16)
    written, add = [], torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, other: written.append(self.data_ptr()) or add(self, other))
    assert written == [model(x, t).data_ptr()]

    seen = []
    handle = model.block2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = model(x, t)
    assert len(written) == 1
    assert torch.equal(out, seen[0] + model.res_conv(x))
    handle.remove()
    model.block2.dropout = nn.Identity()  # any module but dropout may keep what it returns
    model(x, t)
    assert len(written) == 1


def test_training_steps():
    model, x = unet(dropout=0.1), images(2, 3, 8, 8)
    assert_same(trained(fused(model), x, TIMES), trained(model, x, TIMES))


def test_unfuse_is_bitwise():
    model, x = unet(), images(2, 3, 8, 8)
    expected, kinds = results(model, x, TIMES), [type(m) for m in model.modules()]
    fuse(model)
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert_bitwise(results(model, x, TIMES), expected)


KINDS = ("RMSNorm", "SiLU", "Block", "ResnetBlock", "Conv2d", "Dropout", "Linear", "Identity")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kinds", [KINDS, *[(kind,) for kind in KINDS]], ids="-".join)
def test_hooks_are_called_with_what_they_saw(when, kinds):
    net, x, t = Chain(), images(2, 8, 5, 7), images(2, 16)
    expected = recorded(net, x, t, kinds=kinds)
    if when == "after":
        fuse(net)
        seen = recorded(net, x, t, kinds=kinds)
    else:
        seen = recorded(net, x, t, kinds=kinds, then=fuse)
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert all(golden.relative(a, b) <= 2e-5 for (_, a), (_, b) in zip(seen, expected, strict=True))


def test_backward_hooks_are_called_with_what_they_saw():
    def seen(net):
        gradients = []
        for name, module in net.named_modules():
            module.register_full_backward_hook(lambda m, i, o, name=name: gradients.append((name, o[0].clone())))
        results(net, images(2, 8, 5, 7), images(2, 16).requires_grad_())
        return gradients

    model = Chain().eval()
    found, expected = seen(fused(model)), seen(model)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(golden.relative(a, b) <= 2e-5 for (_, a), (_, b) in zip(found, expected, strict=True))


class Chain(nn.Module):
    """Two blocks after each other, the second without a convolution in its shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(8, 12, dropout=0.1), block(12, 12)

    def forward(self, x, t):
        return self.second(self.first(x, t), t)


def test_state_dict_is_unchanged():
    model = unet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert_bitwise(after, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    unet().load_state_dict(after, strict=True)
    model.load_state_dict(before, strict=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model, x, t = fused(Chain()), images(2, 8, 5, 7), images(2, 16)
    same = copied(model)
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    expected = results(model, x, t)
    assert_bitwise(results(same, x, t), expected)
    unfuse(same)
    assert_bitwise(results(model, x, t), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x, t = Chain().eval(), images(2, 8, 5, 7), images(2, 16)
    half, same, exact = copy.deepcopy(model).to(dtype), fused(model).to(dtype), model(x, t)
    out, expected = same(x.to(dtype), t.to(dtype)), half(x.to(dtype), t.to(dtype))
    assert out.dtype == expected.dtype
    assert distance(out, exact) <= 1.05 * distance(expected, exact)


def test_float64_for_which_there_is_no_kernel():
    model, x, t = Chain().double(), images(2, 8, 5, 7).double(), images(2, 16).double()
    assert_bitwise(results(fused(model), x, t), results(model, x, t))


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters(when):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["proj", "mlp.1"], r=2)

    def adapted(net):
        return randomised(peft.inject_adapter_in_model(config, net), seed=4)

    model, x, t = Chain(), images(2, 8, 5, 7), images(2, 16)
    same = fused(adapted(copy.deepcopy(model))) if when == "before" else adapted(fused(model))
    assert any("lora_A" in name for name, _ in same.named_parameters())
    assert_same(results(same, x, t), results(adapted(model), x, t))


@pytest.mark.parametrize("older", [False, True])
def test_autocast(older):
    model = randomised(ResnetBlock(8, 12, adds=False)) if older else Chain().eval()
    x, t = images(2, 8, 5, 7), images(2, 16)
    same, exact = fused(model), model(x, t)
    seen, expected = [], []
    for net, dtypes in ((same, seen), (model, expected)):
        for module in net.modules():
            if type(module).__name__ in ("ResnetBlock", "Block"):
                module.register_forward_hook(lambda m, i, output, dtypes=dtypes: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = same(x, t), model(x, t)
    assert ours.dtype == theirs.dtype
    assert seen == expected
    assert distance(ours, exact) <= 1.05 * distance(theirs, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    class Checkpointed(Chain):
        def forward(self, x, t):
            x = checkpoint(self.first, x, t, use_reentrant=use_reentrant)
            return checkpoint(self.second, x, t, use_reentrant=use_reentrant)

    model, x, t = Checkpointed(), images(2, 8, 5, 7), images(2, 16)
    assert_same(results(fused(model), x, t), results(model, x, t))


@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(training):
    torch.compiler.reset()
    model, x, t = fused(Chain()).train(training), images(2, 8, 5, 7), images(2, 16)
    model.first.block1.dropout.p = 0.0  # whose draws compilation changes
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {key.replace("_orig_mod.", ""): value for key, value in results(compiled, x, t).items()}
    assert_same(found, results(model, x, t))


def test_transforms_of_torch_func():
    """Whose tangents the ops refuse, and whose vmap makes every output of an op a view."""
    model = unet(dim_mults=(1,), flash_attn=False)
    x = images(2, 3, 8, 8)

    def loss(x, time):
        return model(x[None], time[None]).square().sum()

    def transformed():
        tangents = torch.func.jvp(lambda x: model(x, TIMES), (x,), (x.flip(0),))[1]
        return tangents, torch.func.vmap(torch.func.grad(loss))(x, TIMES)

    before = transformed()
    fuse(model)
    for after, expected in zip(transformed(), before, strict=True):
        assert golden.relative(after, expected) <= 2e-5
