"""What `fuse` recognises, what it finds to differ, and what of models nobody knows it fuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffkern
from diffkern.integrations.fusion import Skipped
from tests.fusion.compare import assert_close, assert_fuses, classes, in_float64, reasons, relative, run
from tests.fusion.small import images, inputs, unet


def resnet(kind=None, **settings):
    from diffusers.models.resnet import ResnetBlock2D

    return (kind or ResnetBlock2D)(in_channels=8, out_channels=16, temb_channels=4, groups=4, **settings)


def block_inputs():
    return {"input_tensor": images(2, 6, 8), "temb": images(2, 1, 4).flatten(1)}


def test_a_subclass_that_changes_nothing_is_fused():
    pytest.importorskip("diffusers")
    from diffusers.models.resnet import ResnetBlock2D

    class Mine(ResnetBlock2D):
        pass

    model = nn.ModuleList([resnet(Mine)])
    expected = in_float64(model[0], block_inputs())
    report = diffkern.fuse(model)
    assert [done.block for done in report.replaced] == ["Mine"]
    assert isinstance(model[0], Mine)
    assert_close(run(model[0], block_inputs()), expected)
    diffkern.unfuse(model)
    assert type(model[0]) is Mine


def test_a_subclass_with_its_own_forward_is_left_alone():
    pytest.importorskip("diffusers")
    from diffusers.models.resnet import ResnetBlock2D

    class Mine(ResnetBlock2D):
        def forward(self, input_tensor, temb):
            return super().forward(input_tensor, temb) + input_tensor.mean()

    class HalfNorm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) / 2

    model = nn.ModuleList([resnet(Mine), HalfNorm(2, 4)])
    report = diffkern.fuse(model)
    assert type(model[0]) is Mine
    assert type(model[1]) is HalfNorm
    assert {done.name for done in report.replaced} <= {"0.norm1", "0.norm2"}


def lookalike(name, **members):
    """A class of this name, by itself."""
    return type(name, (nn.Module,), {"__init__": nn.Module.__init__, **members})


def test_a_norm_of_a_known_name_with_other_arithmetic_is_found_out():
    def make(formula):
        kind = lookalike("GroupNorm", forward=formula)
        norm = kind()
        norm.num_groups, norm.eps = 2, 1e-5
        norm.weight, norm.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        return norm

    def right(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def wrong_eps(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, 1e-2)

    def wrong_groups(self, x):
        return F.group_norm(x, 4, self.weight, self.bias, self.eps)

    def without_bias(self, x):
        return F.group_norm(x, self.num_groups, self.weight, None, self.eps)

    def larger_weight(self, x):
        return F.group_norm(x, self.num_groups, 1.001 * self.weight, self.bias, self.eps)

    def changes_its_input(self, x):
        y = right(self, x)
        x.zero_()
        return y

    def two_arguments(self, x, y):
        return right(self, x) + y

    def a_tuple(self, x):
        return (right(self, x),)

    def none(self, x):
        return None

    def wider(self, x):
        return right(self, x).double()

    def fails_in_training(self, x):
        assert not self.training
        return right(self, x)

    def other_in_training(self, x):
        return right(self, x) * (2 if self.training else 1)

    wrong = [wrong_eps, wrong_groups, without_bias, larger_weight, changes_its_input, two_arguments, none, wider]
    wrong += [fails_in_training, other_in_training]
    model = nn.ModuleDict({f.__name__: make(f) for f in (right, *wrong)})
    kinds = classes(model)
    report = diffkern.fuse(model)
    assert [done.name for done in report.replaced] == ["right"]
    assert [left.name for left in report.skipped] == [f.__name__ for f in wrong]
    assert "differs by" in reasons(report, "wrong_eps")[0]
    assert "cannot be tried" in reasons(report, "two_arguments")[0]
    assert [a is b for a, b in zip(classes(model), kinds, strict=True)].count(False) == 1
    x = images(2, 5, 4)
    assert relative(model["wrong_eps"](x), F.group_norm(x, 2, eps=1e-2)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_and_device_do_not_blur_the_comparison(dtype):
    class GroupNorm(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.num_groups, self.eps, self.used = 2, 1e-5, eps
            self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.used)

    model = nn.ModuleList([GroupNorm(1e-5), GroupNorm(1e-3)])
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            report = diffkern.fuse(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [done.name for done in report.replaced] == ["0"]
    assert [left.name for left in report.skipped] == ["1"]


def test_lazy_parameters_and_buffers_without_values():
    lazy = nn.Sequential(nn.LazyConv2d(4, 1), nn.GroupNorm(2, 4), nn.SiLU())
    report = diffkern.fuse(lazy, channels_last=True)
    assert "no shape yet" in reasons(report, "")[0]
    lazy(images(1, 4, 3))
    assert len(diffkern.fuse(lazy).replaced) == 1
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU())
    assert len(diffkern.fuse(model).replaced) == 1


@pytest.mark.parametrize(
    "first", [nn.Conv1d(3, 4, 1), nn.Conv3d(3, 4, 1), nn.Linear(3, 4), nn.ConvTranspose2d(3, 4, 2)]
)
def test_a_sequential_of_any_rank(first):
    model = nn.Sequential(nn.Sequential(first), nn.GroupNorm(2, 4, affine=False), nn.SiLU())
    report = diffkern.fuse(model)
    assert [done.block for done in report.replaced] == ["Sequential"]
    assert not report.skipped


def test_a_resnet_of_diffusers_name_elsewhere_is_not_taken_for_it():
    class ResnetBlock2D(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.nonlinearity, self.dropout, self.conv_shortcut = nn.SiLU(), nn.Dropout(0), None
            self.time_emb_proj, self.time_embedding_norm, self.output_scale_factor = None, "default", 1.0
            self.upsample = self.downsample = None

        def forward(self, x):
            return x - self.conv2(self.nonlinearity(self.norm2(self.conv1(self.norm1(x)))))

    model = ResnetBlock2D()
    assert_fuses(model, {"x": images(2, 6, 4)}, [{}])
    diffkern.fuse(model)
    assert type(model) is ResnetBlock2D


def test_a_block_changed_by_hand_is_still_right():
    """Another dropout, activation or norm in a block is used as it is."""
    pytest.importorskip("diffusers")

    def changed(fuse_first):
        torch.manual_seed(0)
        block = resnet().eval()
        if fuse_first:
            diffkern.fuse(block)
        block.nonlinearity = nn.Tanh()
        block.norm1 = nn.InstanceNorm2d(8)
        block.norm2 = nn.GroupNorm(8, 16, eps=0.1)
        block.dropout = nn.Sigmoid()
        return block

    expected = in_float64(changed(False), block_inputs())
    assert_close(run(changed(True), block_inputs()), expected)
    block = changed(False)
    report = diffkern.fuse(block)
    assert "cannot be made" in reasons(report, "")[0]
    assert_close(run(block, block_inputs()), expected)


def test_a_forward_put_on_an_instance_is_kept_and_reported():
    pytest.importorskip("diffusers")
    block, model = resnet(), unet()
    block.forward = lambda input_tensor, temb: input_tensor
    report = diffkern.fuse(block)
    assert "replaced on the instance" in reasons(report, "")[0]
    x = images(2, 6, 8)
    assert block(x, None) is x
    norm = model.mid_block.resnets[0].norm1
    norm.forward = lambda x: 0 * x
    report = diffkern.fuse(model)
    assert "called as before" in reasons(report, "mid_block.resnets.0.norm1")[0]
    plain = unet()
    plain.mid_block.resnets[0].norm1.forward = lambda x: 0 * x
    assert relative(run(model, inputs()).output, in_float64(plain, inputs()).output) <= 2e-5


def test_a_reason_that_holds_with_an_option_and_without_is_given_once():
    pytest.importorskip("diffusers")
    block = resnet(up=True)
    block.forward = lambda input_tensor, temb: input_tensor
    assert len(reasons(diffkern.fuse(block, fold_upsample=True), "")) == 2  # the other says that the option did nothing


def test_scripted_modules_are_left_alone():
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.GroupNorm(2, 4)), "plain": nn.GroupNorm(2, 4)})
    model["together"] = nn.Sequential(torch.jit.script(nn.GroupNorm(2, 4)), nn.SiLU())
    report = diffkern.fuse(model)
    assert [done.name for done in report.replaced] == ["plain"]
    x = images(1, 3, 4)
    assert relative(model["scripted"](x), F.group_norm(x, 2)) <= 1e-6
    assert relative(model["together"](x), F.silu(F.group_norm(x, 2))) <= 1e-6
    scripted = torch.jit.script(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    assert relative(scripted(x), F.silu(F.group_norm(x, 2))) <= 1e-6
    assert not diffkern.fuse(scripted).replaced


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.GroupNorm(4, 8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )
        self.tokens = nn.Sequential(nn.GroupNorm(1, 4), nn.SiLU(), nn.Conv1d(4, 4, 3, padding=1))
        self.last = nn.GroupNorm(2, 4, affine=False)

    def forward(self, x):
        return self.last(x + self.body(x) + self.tokens(x.flatten(2)).view_as(x))


def test_norms_in_models_nobody_knows():
    torch.manual_seed(0)
    report = assert_fuses(Unknown(), {"x": images(2, 5, 4)})
    assert {done.name for done in report.replaced if done.block != "Unknown"} == {"body", "body.3", "tokens", "last"}


def test_hooks_in_a_sequential():
    model, seen = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), []
    diffkern.fuse(model)
    x = images(2, 5, 4)
    for index in (0, 1):
        handle = model[index].register_forward_hook(lambda m, a, y: seen.append(y))
        expected = F.group_norm(x, 2) if index == 0 else F.silu(F.group_norm(x, 2))
        model(x)
        assert relative(seen.pop(), expected) <= 1e-6
        handle.remove()
    model(x)
    assert not seen
    assert relative(model[:1](x), F.group_norm(x, 2)) <= 1e-6
    model.append(nn.Flatten())
    assert model(x).shape == (2, 100)


def test_what_has_hooks_is_reported():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    model[1].register_forward_hook(lambda *_: None)
    report = diffkern.fuse(model)
    assert report.skipped == (Skipped("1", "SiLU", "it has hooks, or a forward of its own: it is called as before"),)
