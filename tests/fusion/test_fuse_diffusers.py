"""Models of diffusers compute the same fused as unfused: outputs, and gradients of inputs and of every parameter."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffkern
from tests.fusion import golden
from tests.fusion.compare import OPTIONS, TOLERANCE, assert_fuses, randomised, relative
from tests.fusion.small import (
    autoencoder,
    conditional,
    conditional_inputs,
    images,
    inputs,
    unet,
)

NONE_AND_ALL = (OPTIONS[0], OPTIONS[-1])


def replaced(report, block):
    return sum(done.block == block for done in report.replaced)


@pytest.mark.parametrize("options", OPTIONS)
def test_unet2d(options):
    report = assert_fuses(unet(), inputs(), [options])
    assert replaced(report, "ResnetBlock2D") == 8
    assert not report.skipped


UNETS = {
    "fourier": {"time_embedding_type": "fourier"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet resampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet resampling, scale_shift": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "no attention": {"add_attention": False},
    "no middle block": {"mid_block_type": None},
    "classes": {"num_class_embeds": 5},
    "class timesteps": {"class_embed_type": "timestep"},
    "eps": {"norm_eps": 1e-2},
    "32 groups": {"norm_num_groups": 32},
    "attn_norm_num_groups": {"attn_norm_num_groups": 4},
    "downsample_padding 0": {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
    "mid scale": {"mid_block_scale_factor": 2**0.5},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "centred": {"center_input_sample": True},
    "two layers": {"layers_per_block": 2, "block_out_channels": (16, 32)},
    "resnet blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "skip blocks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 64),
        "norm_num_groups": 32,
    },
    "K blocks": {
        "down_block_types": ("KDownBlock2D", "KDownBlock2D"),
        "up_block_types": ("KUpBlock2D", "KUpBlock2D"),
        "block_out_channels": (64, 64),
        "norm_num_groups": 2,
        "mid_block_type": None,
    },
}


FLOAT32_ONLY = ("fourier", "class timesteps")  # whose time embedding is of float32 whatever the dtype of the model


@pytest.mark.parametrize("name", UNETS)
def test_unet2d_with_every_setting(name):
    kwargs = inputs()
    if "class" in name:
        kwargs["class_labels"] = torch.tensor([1, 4])
    assert_fuses(unet(**UNETS[name]), kwargs, NONE_AND_ALL, wide=name not in FLOAT32_ONLY)


@pytest.mark.parametrize("settings", [{}, {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"}])
def test_unet2d_training_with_dropout_of_equal_draws(settings):
    # Draws go to elements in the order of memory: the same with the option channels_last, if they lie so before.
    for options, memory_format in zip(NONE_AND_ALL, (torch.contiguous_format, torch.channels_last), strict=True):
        model = unet(dropout=0.3, **settings).train().to(memory_format=memory_format)
        assert_fuses(model, inputs(), [options], wide=False)


@pytest.mark.parametrize("n", [1, 65])
@pytest.mark.parametrize("settings", [{}, {"downsample_type": "resnet", "upsample_type": "resnet"}])
def test_unet2d_batches_of_one_and_of_more_than_64(n, settings):
    model = unet(block_out_channels=(16, 32), norm_num_groups=4, **settings)
    assert_fuses(model, inputs(n, 8), NONE_AND_ALL, wide=n == 1)


@pytest.mark.parametrize("options", NONE_AND_ALL)
def test_unet2d_channels_last_input(options):
    model = unet().to(memory_format=torch.channels_last)
    kwargs = inputs()
    kwargs["sample"] = kwargs["sample"].contiguous(memory_format=torch.channels_last)
    assert_fuses(model, kwargs, [options])
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


CONDITIONALS = {
    "as Stable Diffusion": ({}, {}),
    "linear projection": ({"use_linear_projection": True}, {}),
    "scale_shift": ({"resnet_time_scale_shift": "scale_shift", "resnet_out_scale_factor": 1.4}, {}),
    "skip_time_act": ({"resnet_skip_time_act": True, "time_embedding_act_fn": "silu"}, {}),
    "mish": ({"act_fn": "mish"}, {}),
    "encoder_hid_dim": ({"encoder_hid_dim": 12}, {"encoder_hidden_states": 12}),
    "text_time": (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        {"added_cond_kwargs": {"text_embeds": torch.ones(2, 16), "time_ids": torch.arange(12).view(2, 6)}},
    ),
    "simple cross attention": (
        {
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
        },
        {},
    ),
    "no middle block": ({"mid_block_type": None}, {}),
}


@pytest.mark.parametrize("name", CONDITIONALS)
def test_unet2d_condition_with_every_setting(name):
    settings, more = CONDITIONALS[name]
    width = more.get("encoder_hidden_states", 24)
    kwargs = {**conditional_inputs(width=width), **{k: v for k, v in more.items() if k != "encoder_hidden_states"}}
    assert_fuses(conditional(**settings), kwargs, NONE_AND_ALL, wide=name != "text_time")


@pytest.mark.parametrize("options", OPTIONS)
def test_unet2d_condition(options):
    report = assert_fuses(conditional(), conditional_inputs(), [options])
    assert replaced(report, "ResnetBlock2D") == 8
    assert not report.skipped


@pytest.mark.parametrize("options", NONE_AND_ALL)
def test_image_size_that_does_not_halve_evenly(options):
    kwargs = conditional_inputs()
    kwargs["sample"] = images(2, 9, 4)[..., :7]
    assert_fuses(conditional(), kwargs, [options])


@pytest.mark.parametrize("options", NONE_AND_ALL)
def test_attention_masks_and_residuals_of_a_controlnet_reach_the_blocks(options):
    kwargs = conditional_inputs()
    kwargs["encoder_attention_mask"] = torch.tensor([[True] * 5, [True, True, False, False, True]])
    kwargs["mid_block_additional_residual"] = images(2, 4, 64)
    kwargs["down_block_additional_residuals"] = [images(2, s, c) for s, c in ((8, 32), (8, 32), (4, 32), (4, 64))]
    assert_fuses(conditional(), kwargs, [options])


@pytest.mark.parametrize("options", OPTIONS)
def test_autoencoder_kl(options):
    model, z = autoencoder(), images(2, 8, 4)
    report = assert_fuses(model, {"sample": images(1, 24)}, [options])
    assert replaced(report, "ResnetBlock2D") == 10
    assert_fuses(model, {"x": images(2, 14)}, [options], call=lambda m: m.encode)
    assert_fuses(model, {"z": z}, [options], call=lambda m: m.decode)


def test_vq_model():
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        latent_channels=4,
        num_vq_embeddings=16,
    )
    report = assert_fuses(randomised(model), {"sample": images(2, 8)}, NONE_AND_ALL)
    assert replaced(report, "ResnetBlock2D") > 6


@pytest.mark.parametrize("norm_type", ["spatial", "group"])
def test_vq_decoder_normalised_by_its_codes(norm_type):
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_type=norm_type,
        norm_num_groups=32,
    )
    model.quantize.embedding.weight.data *= 64  # new codes are so small that some gradients are mostly rounding
    assert_fuses(randomised(model), {"sample": images(2, 8, seed=6)}, NONE_AND_ALL)


def test_controlnet():
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    model = ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    with torch.no_grad():
        for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):
            block.weight.normal_()
    kwargs = {**conditional_inputs(), "controlnet_cond": images(2, 16)}

    def all_residuals(model):
        def call(**kwargs):
            output = model(**kwargs)
            return torch.cat([r.flatten() for r in (*output.down_block_res_samples, output.mid_block_res_sample)])

        return call

    assert_fuses(randomised(model), kwargs, NONE_AND_ALL, all_residuals)


def test_unet3d_condition():
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    model = UNet3DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    kwargs = conditional_inputs()
    kwargs["sample"] = torch.stack([kwargs["sample"], kwargs["sample"].flip(3), kwargs["sample"] ** 2], 2)
    assert_fuses(randomised(model), kwargs, NONE_AND_ALL)


def test_unet_motion():
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    model = UNetMotionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        norm_num_groups=8,
    )
    kwargs = conditional_inputs()
    kwargs["sample"] = torch.stack([kwargs["sample"], kwargs["sample"].flip(3)], 2)
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].repeat_interleave(2, 0)
    assert_fuses(randomised(model), kwargs, NONE_AND_ALL)


@pytest.mark.parametrize("options", NONE_AND_ALL)
def test_two_steps_of_adam(options):
    fused, plain = unet(), unet()
    diffkern.fuse(fused, **options)
    losses = []
    for model in (fused, plain):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
        losses.append([])
        for step in range(2):
            loss = (model(**inputs()).sample - images(seed=step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    for mine, theirs in zip(*losses, strict=True):
        assert relative(mine, theirs) <= 2e-6
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative(mine, theirs) <= TOLERANCE


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", golden.DIFFUSERS)
def test_golden_numbers(name, options):
    model = golden.build(name)
    assert not diffkern.fuse(model, **options).skipped
    golden.check_against_golden(model, name)


@pytest.mark.slow
def test_default_size_unet2d():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = randomised(UNet2DModel(sample_size=32))
    with torch.inference_mode():
        expected = model(images(1, 32), 10).sample
        for options in OPTIONS:
            diffkern.fuse(model, **options)
            assert relative(model(images(1, 32), 10).sample, expected) <= TOLERANCE
        diffkern.unfuse(model)
        assert torch.equal(model(images(1, 32), 10).sample, expected)
