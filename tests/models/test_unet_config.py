import dataclasses
import json

import pytest
import torch

from diffkern.models import UNet, UNetConfig
from diffkern.nn import Attention, GroupNorm

PRESETS = [
    UNetConfig.ddpm_cifar10(),
    UNetConfig.improved_cifar10(),
    UNetConfig.guided_imagenet64(),
    UNetConfig.digits(),
]
GUIDED_256 = dataclasses.replace(
    UNetConfig.guided_imagenet64(),
    channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=2,
    attention_resolutions=(8, 16, 32),
)
GUIDED_512 = dataclasses.replace(GUIDED_256, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_resolutions=(16, 32, 64))


def small(**changes):
    fields = {"in_channels": 3, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    return UNetConfig(**{**fields, **changes})


def on_meta(config):
    with torch.device("meta"):
        return UNet(config)


@pytest.mark.parametrize("config", PRESETS)
def test_survives_json(config):
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_with_defaults_may_be_left_out():
    assert (
        UNetConfig.from_dict({"in_channels": 3, "channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}) == small()
    )


def test_names_unknown_and_missing_keys():
    values = small().to_dict()
    values["num_resblocks"] = values.pop("num_res_blocks")
    with pytest.raises(ValueError, match=r"unknown keys \['num_resblocks'\], missing keys \['num_res_blocks'\]"):
        UNetConfig.from_dict(values)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("in_channels", 0, ValueError),
        ("channels", "32", TypeError),
        ("channels", 33, ValueError),
        ("num_res_blocks", True, TypeError),
        ("channel_mult", (), ValueError),
        ("channel_mult", (1, -1), ValueError),
        ("channel_mult", (1, 0.3), ValueError),
        ("channel_mult", (1, float("inf")), ValueError),
        ("channel_mult", "1,2", TypeError),
        ("channel_mult", ("1", "2"), TypeError),
        ("attention_resolutions", (16,), ValueError),
        ("num_head_channels", 0, ValueError),
        ("qkv_order", "qkv", ValueError),
        ("downsample_padding", 1, ValueError),
        ("embedding_order", "cos", ValueError),
        ("freq_shift", 2, ValueError),
        ("norm_eps", 0.0, ValueError),
        ("norm_eps", "small", TypeError),
        ("dropout", 1.0, ValueError),
        ("dropout", None, TypeError),
        ("learn_sigma", 1, TypeError),
        ("num_classes", 0, ValueError),
        ("null_label", True, ValueError),
    ],
)
def test_names_the_field_that_is_wrong(field, value, error):
    with pytest.raises(error, match=field):
        small(**{field: value})


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (UNetConfig.ddpm_cifar10(), 35_746_307),
        (UNetConfig.improved_cifar10(), 52_546_438),
        (UNetConfig.guided_imagenet64(), 295_904_454),
        (GUIDED_256, 553_838_086),
        (GUIDED_512, 558_997_638),
    ],
)
def test_has_the_published_number_of_parameters(config, parameters):
    assert sum(p.numel() for p in on_meta(config).parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "with_silu", "attention"),
    [
        (UNetConfig.ddpm_cifar10(), 45, 6),
        (UNetConfig.improved_cifar10(), 61, 15),
        (UNetConfig.guided_imagenet64(), 73, 22),
        (GUIDED_256, 85, 16),
    ],
)
def test_every_silu_after_a_norm_is_in_the_norm(config, with_silu, attention):
    """The counts of norms that the published networks have; the only SiLU module left is the one of the time MLP."""
    modules = list(on_meta(config).modules())
    norms = [m for m in modules if isinstance(m, torch.nn.GroupNorm)]
    assert all(type(norm) is GroupNorm for norm in norms)
    assert [sum(norm.activation == kind for norm in norms) for kind in ("silu", None)] == [with_silu, attention]
    assert sum(isinstance(m, Attention) for m in modules) == attention
    assert sum(isinstance(m, torch.nn.SiLU) for m in modules) == 1


def test_the_digits_are_small():
    assert 600_000 < sum(p.numel() for p in on_meta(UNetConfig.digits()).parameters()) < 800_000
