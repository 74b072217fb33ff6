"""The `UNet` against the networks it generalises, run by their own authors' code: output, loss and gradients."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffkern.models import UNet, UNetConfig

GOLDEN = os.environ.get("DIFFKERN_GOLDEN")
pytestmark = pytest.mark.skipif(GOLDEN is None, reason="DIFFKERN_GOLDEN does not name the folder of golden data")

GUIDED = [
    "guided_base",
    "guided_neworder",
    "guided_ssn_updown_cls_sigma",
    "guided_legacy_ssn_sigma_deep",
    "improved_ssn_sigma",
]
GUIDED_NAMES = {
    "time_embed": "time_mlp",
    "label_emb": "label_embedding",
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
    "proj_out": "proj",
    ".op.": ".conv.",
    "input_blocks.0.0": "conv_in",
}
DIFFUSERS_NAMES = {
    "time_embedding.linear_1": "time_mlp.0",
    "time_embedding.linear_2": "time_mlp.2",
    "time_emb_proj": "emb_proj",
    "conv_shortcut": "skip",
    "group_norm": "norm",
    "to_out.0": "proj",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0": "middle.attention",
    "mid_block.resnets.0": "middle.block1",
    "mid_block.resnets.1": "middle.block2",
}


def load(name):
    folder = Path(GOLDEN) / "unets"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def renamed(key, names):
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def guided_key(model, key):
    """Our name of a parameter of `UNetModel`: the stages are the same, their modules are numbered there."""
    key = re.sub(r"\bout\.0\.", "norm_out.", re.sub(r"\bout\.2\.", "conv_out.", key))
    key = renamed(key, GUIDED_NAMES)
    if match := re.match(r"(input_blocks|middle_block|output_blocks)\.(.*)", key):
        path, rest = match.groups()
        if path == "middle_block":
            stage, name = model.middle, "middle"
            number, rest = rest.split(".", 1)
        else:
            index, number, rest = rest.split(".", 2)
            name = f"encoder.{int(index) - 1}" if path == "input_blocks" else f"decoder.{index}"
            stage = model.get_submodule(name)
        key = f"{name}.{list(dict(stage.named_children()))[int(number)]}.{rest}"
    return key


def guided_model(name):
    meta, tensors = load(name)
    kwargs = dict(meta["kwargs"])
    kwargs.pop("image_size", None)
    config = UNetConfig(
        in_channels=kwargs.pop("in_channels"),
        channels=kwargs.pop("model_channels"),
        learn_sigma=kwargs.pop("out_channels") == 6,
        scale_shift_norm=kwargs.pop("use_scale_shift_norm", False),
        qkv_order="qkvhc" if kwargs.pop("use_new_attention_order", False) else "hqkvc",
        **kwargs,
    )
    model = UNet(config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    names = {key: guided_key(model, key) for key in meta["param_grad_names"]}
    # Their 1×1 convolutions in attention are one-dimensional.
    state = {ours: tensors[f"state.{key}"].float().reshape(shapes[ours]) for key, ours in names.items()}
    model.load_state_dict(state)
    return model.eval(), meta, tensors, names


def diffusers_model(name):
    meta, tensors = load(name)
    kwargs = meta["kwargs"]
    model = UNet(
        UNetConfig(
            in_channels=3,
            channels=16,
            channel_mult=(1, 2),
            num_res_blocks=kwargs["layers_per_block"],
            attention_resolutions=(2,),
            qkv_order="qkvhc",
            downsample_padding="tf_same",
            embedding_order="sin_cos",
            freq_shift=kwargs["freq_shift"],
            num_groups=kwargs["norm_num_groups"],
            norm_eps=kwargs["norm_eps"],
        )
    )
    per_level = kwargs["layers_per_block"] + 1
    kinds = {"resnets": "block", "attentions": "attention", "downsamplers": "resample", "upsamplers": "resample"}

    def ours(key):
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
            path, level, kind, index, rest = match.groups()
            index = per_level - 1 if kinds[kind] == "resample" else int(index)
            key = f"{'encoder' if path == 'down' else 'decoder'}.{int(level) * per_level + index}.{kinds[kind]}.{rest}"
        return renamed(key, DIFFUSERS_NAMES)

    names = {key: ours(key) for key in meta["param_grad_names"]}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    state = {}
    for key, name in names.items():
        if ".to_k." in key or ".to_v." in key:
            continue
        parts = [tensors[f"state.{key}"]]
        if ".to_q." in key:  # three projections there, one here
            parts += [tensors[f"state.{key.replace('to_q', other)}"] for other in ("to_k", "to_v")]
            name = name.replace("to_q", "qkv")
        state[name] = torch.cat(parts).float().reshape(shapes[name])
    model.load_state_dict(state)
    return model.eval(), meta, tensors, {key: name for key, name in names.items() if ".to_" not in name}


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [*GUIDED, "diffusers_unet2d_cifar"])
def test_output_and_gradients_are_the_peers(name, memory_format):
    model, meta, tensors, names = (guided_model if name in GUIDED else diffusers_model)(name)
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]

    model = model.to(memory_format=memory_format)
    x = tensors["in.x"].contiguous(memory_format=memory_format).requires_grad_()
    out = model(x, tensors["in.timesteps"], tensors.get("in.y"))
    assert relative(out, tensors["out"]) < 3e-6

    loss = (out - tensors["target"]).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    assert relative(x.grad, tensors["grad.x"]) < 1e-5

    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    norms = dict(zip(meta["param_grad_names"], tensors["param_grad_norms"], strict=True))
    ours = torch.stack([grads[name].norm() for name in names.values()])
    assert relative(ours, torch.stack([norms[key] for key in names])) < 1e-5
    for key in (key.removeprefix("grad.param.") for key in tensors if key.startswith("grad.param.")):
        if key in names:
            want = tensors[f"grad.param.{key}"]
            assert relative(grads[names[key]].reshape(want.shape), want) < 1e-5
