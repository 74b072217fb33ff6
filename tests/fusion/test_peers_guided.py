"""What the stand-ins for guided-diffusion and improved-diffusion do beyond the configurations of the golden data."""

import pytest
import torch

from tests.fusion.peers import guided_diffusion, improved_diffusion
from tests.fusion.peers.guided_encoder import EncoderUNetModel

# Two channels a group at least: of one alone, a norm takes away whatever is added to it, and the gradient is zero.
SMALL = {"model_channels": 64, "num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def guided(**kwargs):
    torch.manual_seed(0)
    return randomised(guided_diffusion.UNetModel(16, 3, out_channels=3, **SMALL, **kwargs))


def improved(**kwargs):
    torch.manual_seed(0)
    return randomised(improved_diffusion.UNetModel(3, out_channels=3, **SMALL, **kwargs))


def gradients(model, *args):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = model(x, torch.tensor([3, 500]), *args)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("make", [guided, improved])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_changes_rounding_at_most(make, frozen):
    models = [make(use_checkpoint=flag, use_scale_shift_norm=True) for flag in (False, True)]
    for model in models:
        model.input_blocks.requires_grad_(not frozen)
    for plain, checkpointed in zip(*map(gradients, models), strict=True):
        # What flows to one tensor from several blocks is added in another order.
        assert (plain - checkpointed).abs().max() <= 3e-6 * plain.abs().max()


def test_attention_orders_differ_by_a_permutation_of_the_projection():
    legacy, new = (guided(num_heads=4, use_new_attention_order=flag) for flag in (False, True))
    for module in new.modules():
        if isinstance(module, guided_diffusion.AttentionBlock):
            for parameter in module.qkv.parameters():  # [q, k, v][head][channel] from [head][q, k, v][channel]
                split = parameter.data.unflatten(0, (4, 3, -1))
                parameter.data = split.transpose(0, 1).flatten(0, 2).clone()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    with torch.no_grad():
        torch.testing.assert_close(new(x, t), legacy(x, t))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"resblock_updown": True, "num_head_channels": 16, "dropout": 0.3},
        {"conv_resample": False, "use_scale_shift_norm": True, "num_heads": 2, "num_heads_upsample": 4},
        {"num_classes": 5},
    ],
)
def test_every_option_keeps_the_size(dims, options):
    model = guided(dims=dims, **options)
    labels = [torch.tensor([0, 4])] if "num_classes" in options else []
    x = torch.randn(2, 3, *[2, 8, 8][-dims:] if dims == 3 else [16] * dims)
    out = model(x, torch.tensor([3, 500]), *labels)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("make", [guided, improved])
def test_half_precision_is_for_convolutions_of_the_body(make):
    model = make(**({"use_fp16": True} if make is guided else {}))
    model.convert_to_fp16()
    halved = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.float16}
    body = {"input_blocks", "middle_block", "output_blocks"}
    convolutions = {name for name, module in model.named_modules() if "Conv" in type(module).__name__}
    assert {name.rpartition(".")[0] for name in halved} == {c for c in convolutions if c.partition(".")[0] in body}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    with torch.no_grad():
        half = model(x, t)
        model.convert_to_fp32()
        model.dtype = torch.float32
        assert half.dtype is torch.float32
        assert 0 < (half - model(x, t)).abs().max() < 0.05 * half.abs().max()


@pytest.mark.parametrize(
    "model",
    [
        guided_diffusion.SuperResModel(16, 3, out_channels=6, **SMALL),
        improved_diffusion.SuperResModel(3, out_channels=6, **SMALL),
    ],
)
def test_super_resolution_sees_the_small_image(model):
    randomised(model)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    with torch.no_grad():
        first, second = (model(x, t, low_res=torch.randn(2, 3, 8, 8)) for _ in range(2))
    assert first.shape == (2, 6, 16, 16)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("pool", ["adaptive", "attention"])
def test_the_classifier_pools_the_encoder(pool):
    model = randomised(EncoderUNetModel(16, 3, out_channels=7, num_head_channels=16, pool=pool, **SMALL))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = model(x, torch.tensor([3, 500]))
    assert logits.shape == (2, 7)
    logits.log_softmax(dim=1)[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in (x, *model.parameters()))
