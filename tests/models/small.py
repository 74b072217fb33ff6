"""Small networks for the tests of models."""

import torch

from diffkern.models import UNet, UNetConfig


def small_config(**changes):
    fields = {
        "in_channels": 3,
        "channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "num_heads": 2,
        "num_groups": 4,
    }
    return UNetConfig(**{**fields, **changes})


def small_model(**changes):
    """A `UNet` whose zero-initialised parts are random too, so that nothing is trivially equal."""
    torch.manual_seed(0)
    model = UNet(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


# One network of each kind of block, both class-conditional.
PLAIN = {"num_classes": 3, "null_label": True, "downsample_padding": "tf_same"}
GUIDED = {"num_classes": 3, "scale_shift_norm": True, "resblock_updown": True, "learn_sigma": True, "dropout": 0.3}
KINDS = [PLAIN, GUIDED]
