"""Networks of other codebases with the weights, outputs and gradients that their own code gave them.

The folder that DIFFKERN_GOLDEN names has them in `unets`; without it the tests that ask for one are skipped.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.fusion.peers import edm, edm_preconditioners, guided_diffusion, improved_diffusion
from tests.fusion.peers.lucidrains import denoising_diffusion_pytorch

GUIDED = ["guided_base", "guided_legacy_ssn_sigma_deep", "guided_neworder", "guided_ssn_updown_cls_sigma"]
IMPROVED = ["improved_ssn_sigma"]
EDM = ["edm_dhariwal", "edm_precond_song", "edm_song_ddpmpp", "edm_song_ncsnpp"]
DIFFUSERS = ["diffusers_cond_sd", "diffusers_unet2d_cifar"]
LUCIDRAINS = ["lucid_base"]
NAMES = [*GUIDED, *IMPROVED, *EDM, *DIFFUSERS, *LUCIDRAINS]


@functools.cache
def _read(stem: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(stem.with_suffix(".json").read_text()), load_file(stem.with_suffix(".safetensors"))


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is known of the network `name`, and its tensors; skips the test where DIFFKERN_GOLDEN is not set."""
    if "DIFFKERN_GOLDEN" not in os.environ:
        pytest.skip("DIFFKERN_GOLDEN does not name the folder of golden data")
    return _read(Path(os.environ["DIFFKERN_GOLDEN"]) / "unets" / name)


def network_class(path: str) -> type[nn.Module]:
    """The class that the original's import path names: installed, or its stand-in."""
    module, _, name = path.rpartition(".")
    if module == "guided_diffusion.unet":
        return getattr(guided_diffusion, name)
    if module == "improved_diffusion.unet":
        return getattr(improved_diffusion, name)
    if module == "training.networks":
        return getattr(edm_preconditioners if name.endswith("Precond") else edm, name)
    if module.startswith("denoising_diffusion_pytorch"):
        return getattr(denoising_diffusion_pytorch(), name)
    pytest.importorskip(module.partition(".")[0])
    return getattr(importlib.import_module(module), name)


def build(name: str) -> nn.Module:
    """The network `name` with its weights, in eval mode and float32."""
    meta, tensors = load(name)
    model = network_class(meta["cls"])(**meta["kwargs"])
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    model.load_state_dict(state, strict=True)
    return model.eval()


def build_inputs(name: str) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """What to call the network `name` with; the first positional one is x, a fresh leaf that wants a gradient."""
    meta, tensors = load(name)
    args = [None if key in meta["none_positional"] else tensors[f"in.{key}"] for key in meta["positional"]]
    args[0] = args[0].clone().requires_grad_()
    return args, {key: tensors[f"in.{key}"] for key in meta["keyword"]}


def relative(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|; NaN anywhere gives NaN, which no tolerance passes."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def errors(model: nn.Module, name: str) -> dict[str, float]:
    """How far `model` is from the numbers of the network `name`, by what differs, relative to the largest.

    `output`, `loss`, `grad.x`, `grad.NAME` of the stored parameters' gradients, and `grad_norms` of all parameters'.
    Replaces the gradients that the parameters have.
    """
    meta, tensors = load(name)
    args, kwargs = build_inputs(name)
    model.zero_grad()
    out = model(*args, **kwargs)
    out = out if isinstance(out, Tensor) else out.sample
    loss = (out - tensors["target"]).square().mean()
    loss.backward()

    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert sorted(gradients) == sorted(meta["param_grad_names"])
    norms = torch.stack([gradients[key].norm() for key in meta["param_grad_names"]])
    found = {
        "output": relative(out, tensors["out"]),
        "loss": relative(loss.reshape(1), tensors["loss"]),
        "grad.x": relative(args[0].grad, tensors["grad.x"]),
        "grad_norms": relative(norms, tensors["param_grad_norms"]),
    }
    for key in (key.removeprefix("grad.param.") for key in tensors if key.startswith("grad.param.")):
        found[f"grad.{key}"] = relative(gradients[key], tensors[f"grad.param.{key}"])
    return found


def check_against_golden(model: nn.Module, name: str) -> None:
    """Fails unless `model`, in eval mode, gives the numbers of the network `name` but for float32's rounding.

    The bounds are two to three times what the same operations reach in another order: single numbers differ by up to
    4e-6 of the largest; sums over many of them, in which the rounding of each averages out, by up to 4e-7.
    """
    assert not model.training
    bounds = {"output": 6e-6, "loss": 1e-6, "grad_norms": 1e-6}
    beyond = {key: error for key, error in errors(model, name).items() if not error <= bounds.get(key, 1e-5)}
    assert not beyond, f"{name}: {beyond}"
