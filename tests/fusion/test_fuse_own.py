"""diffkern's own U-Net under `fuse`: the options compute what the network did, and keep away where they must."""

import copy
import pickle

import pytest
import torch

from diffkern import fuse, unfuse
from diffkern.integrations.fusion.blocks import own
from diffkern.models import UNet, UNetConfig
from tests.fusion.compare import assert_fuses, randomised

SMALL = UNetConfig(in_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, num_groups=8)
EVERY = {"channels_last": True, "fold_upsample": True, "virtual_concat": True}


def network(**settings):
    model = UNet(UNetConfig(**{**SMALL.to_dict(), **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return randomised(model)


def inputs(size=12):
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 3, size, size, generator=generator), "t": torch.tensor([3, 700])}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": (2,)},
        {"learn_sigma": True, "embedding_order": "sin_cos", "num_res_blocks": 2},
        {"gradient_checkpointing": True},
    ],
)
def test_fused_computes_the_same(settings):
    assert_fuses(network(**settings), inputs(32), wide=False)


def test_the_options_apply():
    report = fuse(network(), **EVERY)
    assert {row.block for row in report.replaced} == {"ResBlock", "Attention", "Upsample", "UNet"}
    assert not report.skipped
    folded = fuse(network(resblock_updown=True), fold_upsample=True)
    assert sum("fold_upsample" in row.effect for row in folded.replaced) == 1


def test_a_hooked_block_is_called_and_the_rest_is_not_affected():
    model, seen = network(), []
    expected = model(**inputs())
    fuse(model, **EVERY)
    handle = model.decoder[0].block.register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    assert (model(**inputs()) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert seen == [model.decoder[0].block.norm1.num_channels]  # of the concatenation
    handle.remove()
    model(**inputs())
    assert len(seen) == 1


def test_copies_and_pickles_stay_fused():
    model = network()
    expected = model(**inputs())
    fuse(model, virtual_concat=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert type(again.middle.block1) is type(model.middle.block1)
        assert torch.equal(again(**inputs()), model(**inputs()))
        assert type(unfuse(again)) is UNet
        assert torch.equal(again(**inputs()), expected)


def test_a_way_that_differs_leaves_the_others(monkeypatch):
    """Where folding would be wrong the block is fused without it, and the report says why."""
    right = own.FoldedResBlockMethod.first_half
    monkeypatch.setattr(own.FoldedResBlockMethod, "first_half", lambda self, x: right(self, 1.01 * x))
    model = network(resblock_updown=True)
    expected = model(**inputs())
    report = fuse(model, fold_upsample=True)
    name = next(name for name, module in model.named_modules() if getattr(module, "resample", None) == "up")
    assert {row.effect for row in report.replaced if row.name == name} == {"residual in place"}
    assert [row.name for row in report.skipped if "differs" in row.reason] == [name]
    assert (model(**inputs()) - expected).abs().max() <= 2e-5 * expected.abs().max()
