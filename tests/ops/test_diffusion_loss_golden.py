"""Losses and gradients that guided-diffusion and denoising-diffusion-pytorch computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkern.ops import diffusion_loss_and_grad
from diffkern.process.gaussian import ProcessTables
from tests.golden_data import FOLDER, Golden, error, load
from tests.stub_networks import net

GUIDED = load("guided_gaussian")
NAMES = {"EPSILON": "eps", "START_X": "x0"}
# Only some of their processes were run with more than one kind of network.
GUIDED_CASES = [
    (proc["key"], name) for proc in GUIDED.meta["procs"] for name in NAMES if name == "EPSILON" or proc["full_matrix"]
]
OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


def network(golden: Golden, x_t: np.ndarray, t: np.ndarray) -> Tensor:
    """The network's output in float64, as the peer's float32 network gave it to rounding."""
    return torch.from_numpy(net(x_t.astype(np.float64), t, **{name: golden.meta["stub"][name] for name in "abw"}))


def check(output: Tensor, x0: Tensor, t: Tensor, tables: ProcessTables, loss, grad, tolerance: float, **rest) -> None:
    found = diffusion_loss_and_grad(output.float(), x0, t, tables, scale=1.0, **rest)
    for ours, theirs in zip(found, (loss, grad), strict=True):
        assert error(ours.numpy(), theirs) < tolerance


@pytest.mark.parametrize(("key", "name"), GUIDED_CASES)
def test_guided_diffusion(backend, key, name):
    case = f"{key}/{name}/FIXED_SMALL"
    loss, grad = (GUIDED[f"{case}/loss/MSE/{what}"] for what in ("loss", "grad_model_output"))
    output = network(GUIDED, GUIDED[f"{key}/q_sample"], GUIDED[f"{case}/model_t"])
    x0, noise = (torch.from_numpy(GUIDED[f"inputs/{what}"]) for what in ("x0", "noise"))
    tables = ProcessTables(
        *(torch.from_numpy(GUIDED[f"{key}/tables/{table}"].astype(np.float64)) for table in ProcessTables._fields[:2])
    )
    t = torch.from_numpy(GUIDED[f"{key}/t"].astype(np.int64))
    check(output, x0, t, tables, loss, grad, 2e-6, target=NAMES[name], noise=noise)


@pytest.mark.parametrize("number", range(10))
def test_lucidrains(backend, number):
    """Their minimum-SNR weights are ours to give."""
    golden, key = load("lucidrains_gaussian"), f"c{number}"
    case = next((case for case in golden.meta["cases"] if case["key"] == key), None)
    if case is None:
        pytest.skip(f"{key} is not in {FOLDER}; DIFFKERN_GOLDEN may name the whole collection")
    t = torch.from_numpy(golden[f"{key}/t"])
    # Their tables are float32; made of their betas in float64 they would differ by 1.5e-5.
    tables = ProcessTables(*(torch.from_numpy(golden[f"{key}/buffers/{table}"]) for table in ProcessTables._fields[:2]))
    output = network(golden, golden[f"{key}/q_sample"], t.numpy())
    x0, noise = torch.from_numpy(2 * golden["inputs/img01"] - 1), torch.from_numpy(golden["inputs/noise"])
    weight = torch.from_numpy(golden[f"{key}/buffers/loss_weight"])[t]
    loss, grad = golden[f"{key}/loss_per_sample"], golden[f"{key}/grad_model_output"]
    check(output, x0, t, tables, loss, grad, 2e-6, target=OBJECTIVES[case["objective"]], weight=weight, noise=noise)
