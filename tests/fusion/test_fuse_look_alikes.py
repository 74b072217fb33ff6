"""What has a known block's name and attributes, and does something else that its numbers hardly show."""

import random
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffkern
from diffkern.integrations.fusion.blocks.guided_diffusion import ResBlockMethod
from tests.fusion.compare import randomised, reasons
from tests.fusion.peers import edm, guided_diffusion
from tests.fusion.small import images


class GroupNorm32(nn.GroupNorm):
    """That of the OpenAI codebases, to begin with."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def named(kind, name):
    kind.__name__ = name
    return kind


def res_block(norm=GroupNorm32, kind=guided_diffusion.ResBlock, **settings):
    block = kind(32, 8, 0.0, **settings)
    block.in_layers[0], block.out_layers[0] = norm(32, 32), norm(32, 32)
    return randomised(block)


def test_an_eps_of_its_own_is_found_out_within_a_block():
    class OwnEps(nn.GroupNorm):
        def forward(self, x):
            return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, 1e-6).type(x.dtype)

    block = res_block(named(OwnEps, "GroupNorm32"))
    x, emb = 1e-3 * images(2, 6, 32), torch.randn(2, 8)
    before = block(x, emb)
    report = diffkern.fuse(block)
    assert not report.replaced
    assert "in_layers.0" in reasons(report, "")[0]
    assert torch.equal(block(x, emb), before)


def test_an_rms_norm_with_eps_in_the_root_is_found_out():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.g

    assert not diffkern.fuse(nn.ModuleList([RMSNorm()])).replaced


@pytest.mark.parametrize("keeps", ["a buffer", "an attribute", "a list"])
def test_a_norm_that_keeps_something_is_called(keeps):
    class Keeping(nn.GroupNorm):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("mean", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            if keeps == "a buffer" and self.training:
                self.mean.lerp_(x.detach().mean(), 0.1)
            elif keeps == "an attribute":
                self.last = x
            elif keeps == "a list":
                self.seen.append(x)
            return super().forward(x.float()).type(x.dtype)

    block = res_block(named(Keeping, "GroupNorm32"))
    report = diffkern.fuse(block)
    assert not report.replaced
    norm = block.in_layers[0]
    assert norm.mean == 0
    assert norm.seen == []
    assert not hasattr(norm, "last")


def test_trying_a_block_draws_from_no_generator_of_the_callers():
    numpy = pytest.importorskip("numpy")

    class Drawing(guided_diffusion.ResBlock):
        def _forward(self, x, emb):
            return super()._forward(x, emb) * random.random() * numpy.random.rand()

    block = res_block(kind=named(Drawing, "ResBlock"))
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    report = diffkern.fuse(block)
    assert "differs" in reasons(report, "")[0]
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_dropout_elsewhere_is_found_out_while_its_rate_is_zero():
    class Early(guided_diffusion.ResBlock):
        def _forward(self, x, emb):
            h = self.in_layers(self.out_layers[2](x)) + self.emb_layers(emb)[..., None, None]
            return self.skip_connection(x) + self.out_layers[3](self.out_layers[1](self.out_layers[0](h)))

    block = res_block(kind=named(Early, "ResBlock"))
    assert "differs" in reasons(diffkern.fuse(block), "")[0]
    assert block.out_layers[2].p == 0


def test_settings_in_an_object_are_settings():
    class SiLU(nn.Module):
        def __init__(self, beta):
            super().__init__()
            self.config = SimpleNamespace(beta=beta)

        def forward(self, x):
            return x * torch.sigmoid(self.config.beta * x)

    model = nn.ModuleList(nn.Sequential(nn.GroupNorm(2, 8), SiLU(beta)) for beta in (1.0, 1.7))
    report = diffkern.fuse(model)
    assert "0" in [done.name for done in report.replaced]
    assert "differs" in reasons(report, "1")[0]


def test_an_argument_more_is_still_taken():
    class Conditioned(edm.UNetBlock):
        def forward(self, x, emb, condition=None):
            h = super().forward(x, emb)
            return h if condition is None else h + condition

    block = randomised(named(Conditioned, "UNetBlock")(32, 32, 8))
    x, emb = images(2, 6, 32), torch.randn(2, 8)
    before = block(x, emb, condition=x)
    report = diffkern.fuse(block)
    assert "condition=None" in reasons(report, "")[0]
    assert (block(x, emb, condition=x) - before).abs().max() <= 2e-5 * before.abs().max()


def test_a_norm_takes_its_input_by_name():
    norm = nn.GroupNorm(2, 8)
    before = norm(input=images(2, 6, 8))
    diffkern.fuse(norm)
    assert torch.allclose(norm(input=images(2, 6, 8)), before, atol=1e-5)


def test_nothing_of_the_class_is_hidden():
    class WithExample(guided_diffusion.ResBlock):
        example = (1, 2, 3)

    block = res_block(kind=named(WithExample, "ResBlock"))
    report = diffkern.fuse(block)
    assert "'example'" in reasons(report, "")[0]
    assert block.example == (1, 2, 3)


def test_not_a_number_is_no_agreement(monkeypatch):
    original = ResBlockMethod.second_half
    monkeypatch.setattr(ResBlockMethod, "second_half", lambda *args: original(*args) * float("nan"))
    report = diffkern.fuse(res_block())
    assert "not finite" in reasons(report, "")[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_inner_forward_is_called(when):
    settings = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
    model = randomised(guided_diffusion.UNetModel(**settings, attention_resolutions=(), channel_mult=(1,)))
    block, calls = model.output_blocks[0][0], []

    def replace():
        own = block._forward
        block._forward = lambda x, emb: calls.append(x.shape[1]) or own(x, emb)

    if when == "before":
        replace()
    report = diffkern.fuse(model, virtual_concat=True)
    if when == "after":
        replace()
    calls.clear()
    model(images(2, 8), torch.tensor([1, 2]))
    assert calls == [64]
    assert (when == "before") == any("_forward was replaced" in left.reason for left in report.skipped)


def test_containers_of_a_module_are_given_back_as_they_were():
    class Caching(guided_diffusion.ResBlock):
        def __init__(self, *args):
            super().__init__(*args)
            self.cache, self.names = OrderedDict(a=1), {"a"}

        def _forward(self, x, emb):
            self.cache[len(self.cache)] = x
            self.names.add("b")
            return super()._forward(x, emb)

    block = res_block(kind=named(Caching, "ResBlock"))
    cache, names = block.cache, block.names
    report = diffkern.fuse(block)
    assert "cache, names" in reasons(report, "")[0]
    assert block.cache is cache
    assert block.names is names
    assert cache == {"a": 1}
    assert names == {"a"}
