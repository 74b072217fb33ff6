"""guided-diffusion's stored runs: its diffusions rebuilt, its network's outputs, its noise handed to the steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch

from diffkern.integrations.guided_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    bound,
    get_named_beta_schedule,
    space_timesteps,
    steps,
)
from tests.golden_data import load
from tests.stub_networks import net

GOLDEN = load("guided_gaussian")
PROCS = {proc["key"]: proc for proc in GOLDEN.meta["procs"]}
CASES = [
    (key, mean.name, variance.name)
    for key in PROCS
    for mean in ModelMeanType
    for variance in ModelVarType
    if f"{key}/{mean.name}/{variance.name}/model_output" in GOLDEN
]


class Pieced(SpacedDiffusion):
    """Has a hook of its own, which makes everything go through the methods."""

    def p_mean_variance(self, *args, **kwargs):
        return super().p_mean_variance(*args, **kwargs)


ROADS = {"one pass": SpacedDiffusion, "methods": Pieced}


def diffusion_of(key: str, mean: str, variance: str, loss: str = "MSE", road: str = "one pass") -> SpacedDiffusion:
    proc = PROCS[key]
    return ROADS[road](
        space_timesteps(proc["T"], proc["respacing"] or [proc["T"]]),
        betas=get_named_beta_schedule(proc["schedule"], proc["T"]),
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[variance],
        loss_type=LossType[loss],
        rescale_timesteps=proc["rescale_timesteps"],
    )


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key])


class StoredModel:
    """Returns the stored output, and insists on the timesteps that it was stored for."""

    def __init__(self, case: str) -> None:
        self.output, self.t = tensor(f"{case}/model_output"), tensor(f"{case}/model_t")

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        assert t.dtype == self.t.dtype
        torch.testing.assert_close(t, self.t, rtol=1e-7, atol=0)
        return self.output


def stub_model(variance: str):
    """The closed-form network that the stored runs were made with."""
    kind = {"LEARNED_RANGE": "range", "LEARNED": "log"}.get(variance)
    constants = {name: GOLDEN.meta["stub"][name] for name in "abw"}
    network = functools.partial(net, **constants, var=kind)
    return lambda x, t: torch.from_numpy(network(x.numpy(), t.numpy()))


def gradient(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The closed-form classifier's gradient: s·cos(a·x + b·t) + 0.05·y."""
    a, b, s = (GOLDEN.meta["cond_fn"][name] for name in "abs")
    time, label = (value.to(x.dtype).reshape(-1, 1, 1, 1) for value in (t, y))
    return s * torch.cos(a * x + b * time) + 0.05 * label


def replay(monkeypatch, noise: Iterable[np.ndarray]) -> None:
    """Every step, and every term of a bound, takes the next of `noise` instead of drawing."""
    stored = iter(noise)
    for module in (steps, bound):
        monkeypatch.setattr(module, "noise_source", lambda kind, like: {"noise": torch.from_numpy(next(stored))})


def exact_ddim(case: str, clip: bool, eta: float, noise: np.ndarray | None) -> np.ndarray:
    """DDIM's step (arXiv 2010.02502, eq. 12) at the stored t, or, without noise, the one backwards; in float64."""
    key, mean, _ = case.split("/")
    t = GOLDEN[f"{key}/t"]

    def at(name: str) -> np.ndarray:
        return GOLDEN[f"{key}/tables/{name}"][t].reshape(-1, 1, 1, 1)

    x = GOLDEN["inputs/x_t"].astype(np.float64)
    output = GOLDEN[f"{case}/model_output"].astype(np.float64)
    abar = at("alphas_cumprod")
    if mean == "EPSILON":
        x0 = (x - np.sqrt(1 - abar) * output) / np.sqrt(abar)
    elif mean == "PREVIOUS_X":
        x0 = (output - at("posterior_mean_coef2") * x) / at("posterior_mean_coef1")
    else:
        x0 = output
    x0 = x0.clip(-1, 1) if clip else x0
    eps = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
    if noise is None:
        target = at("alphas_cumprod_next")
        return np.sqrt(target) * x0 + np.sqrt(1 - target) * eps
    target = at("alphas_cumprod_prev")
    variance = eta**2 * (1 - target) / (1 - abar) * (1 - abar / target)
    return np.sqrt(target) * x0 + np.sqrt(1 - target - variance) * eps + np.sqrt(variance) * noise
