"""Losses, their gradients and bits/dim against guided-diffusion's, in one pass and through the methods.

The peer's float32 is off where its grey levels' log-likelihood subtracts nearly equal numbers (t = 0 of badly fitting
models). There its own float64 run is compared with, or, for gradients, the formulas in float64.
"""

import numpy as np
import pytest
import torch

from diffkern.integrations.guided_diffusion import LossType
from tests.integrations.guided_diffusion.exact_losses import Exact
from tests.integrations.guided_diffusion.replay import GOLDEN, PROCS, ROADS, diffusion_of, replay, stub_model, tensor

# Relative, of each sample's number. The methods take the difference of nearly equal means in float32, as the peer does.
NEAR = {"one pass": 1e-5, "methods": 5e-4}
# Of the largest entry of a sample's gradient: the float32 peer's own distance from float64 is up to 7e-4.
PEERS_GRADIENT = 1e-3
LEARNED = ("LEARNED", "LEARNED_RANGE")


def relative(value, *accepted):
    """The distance from the nearest of the accepted numbers, each entry's by itself."""
    return np.min([np.abs(value - one) / np.abs(one) for one in accepted], axis=0).max()


def in_float64(name, case, loss, steps):
    """The peer's own float64 number of a loss, a term or none, made of the losses of which such a run is stored."""
    stored = f"{case}/loss/{loss}/{name}"
    if f"{stored}_f64" in GOLDEN:
        return [GOLDEN[f"{stored}_f64"]]
    if loss == "RESCALED_KL":
        return [GOLDEN[f"{case}/loss/KL/loss_f64"] * steps]
    if loss == "RESCALED_MSE" and name in ("vb", "loss") and case.endswith(LEARNED):
        vb = GOLDEN[f"{case}/loss/MSE/vb_f64"]
        rescaled = vb * (steps / 1000)
        return [rescaled if name == "vb" else GOLDEN[f"{case}/loss/MSE/loss_f64"] - vb + rescaled]
    return []


STORED = sorted(name.rsplit("/", 1)[0] for name in GOLDEN.arrays.files if "/loss/" in name and name.endswith("/loss"))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("stored", STORED)
def test_training_losses(stored, road):
    key, mean, variance, _, loss = stored.split("/")
    case = f"{key}/{mean}/{variance}"
    d = diffusion_of(key, mean, variance, loss, road)
    network, leaves = stub_model(variance), []

    def model(x, t):
        leaves.append((x, network(x, t).requires_grad_()))
        return leaves[-1][1]

    x0, noise, t = tensor("inputs/x0"), tensor("inputs/noise"), tensor(f"{key}/t")
    terms = d.training_losses(model, x0, t, noise=noise)
    both = loss.endswith("MSE") and variance in LEARNED
    assert set(terms) == ({"loss", "mse", "vb"} if both else {"loss", "mse"} if loss.endswith("MSE") else {"loss"})
    for name, value in terms.items():
        assert value.dtype == torch.float32
        accepted = [GOLDEN[f"{stored}/{name}"], *in_float64(name, case, loss, d.num_timesteps)]
        assert relative(value.detach().numpy(), *accepted) < NEAR[road], name

    terms["loss"].sum().backward()
    ((x_t, output),) = leaves
    exact = exact_gradient(d, output, x0, x_t, t, noise)
    share = np.abs(output.grad.numpy() - exact).reshape(4, -1).max(1) / np.abs(exact).reshape(4, -1).max(1)
    # The formulas in float64 take 1 − tanh in the tails, down to 1e-12: to 1e-4.
    assert share[0] < 1e-4
    assert share[1:].max() < (2e-5 if road == "one pass" else PEERS_GRADIENT)
    if f"{stored}/grad_model_output" in GOLDEN:
        grad, peers = output.grad.numpy(), GOLDEN[f"{stored}/grad_model_output"]
        assert (np.abs(grad - peers)[1:] <= PEERS_GRADIENT * np.abs(peers[1:]).max((1, 2, 3), keepdims=True)).all()
        likely = (Exact(d, output.detach(), x0, x_t, t, False).log_likelihood()[0] > -8).numpy()
        likely = np.concatenate([likely] * (len(grad[0]) // len(likely)))
        assert np.abs(grad[0] - peers[0])[likely].max() < PEERS_GRADIENT * np.abs(peers[0][likely]).max()


def exact_gradient(d, output, x0, x_t, t, noise):
    """That of the sum of the losses by the network's output, in float64."""
    leaf = output.detach().double().requires_grad_()
    exact = Exact(d, leaf, x0, x_t, t, clip=False)
    if d.loss_type.is_vb():
        total = exact.vb() * (d.num_timesteps if d.loss_type == LossType.RESCALED_KL else 1)
    else:
        total = exact.mse(noise)
        if leaf.shape != x0.shape:
            mean, variance = leaf.chunk(2, dim=1)
            held = Exact(d, torch.cat([mean.detach(), variance], dim=1), x0, x_t, t, clip=False)
            total = total + held.vb() * (d.num_timesteps / 1000 if d.loss_type == LossType.RESCALED_MSE else 1)
    total.sum().backward()
    return leaf.grad.numpy()


@pytest.mark.parametrize("key", PROCS)
def test_prior_bpd(key):
    d, x0 = diffusion_of(key, "EPSILON", "FIXED_SMALL"), tensor("inputs/x0")
    prior = d._prior_bpd(x0)
    # Next to 1, the peer's ᾱ and its exponential leave 1e-4 of the small number that they are the difference of.
    assert relative(prior.numpy(), GOLDEN[f"{key}/prior_bpd"]) < 2e-4
    abar = d.alphas_cumprod[-1]
    exact = (0.5 * (abar * x0.numpy().astype(np.float64) ** 2 - abar - np.log1p(-abar))).mean((1, 2, 3)) / np.log(2)
    assert relative(prior.numpy(), exact) < 2e-4


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("loop", [loop for loop in GOLDEN.meta["loops"] if f"{loop}/bpd/vb" in GOLDEN])
def test_calc_bpd_loop(loop, road, monkeypatch):
    """Column 0 is t = T−1, the first draw."""
    _, key, mean, variance, clip = loop.split("/")
    d, stored = diffusion_of(key, mean, variance, road=road), f"{loop}/bpd"
    noise = GOLDEN[f"{stored}/noise"]
    assert len(noise) == d.num_timesteps
    replay(monkeypatch, noise)
    found = d.calc_bpd_loop(stub_model(variance), tensor(f"{stored}/x_start"), clip_denoised=clip == "clip1")
    assert set(found) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    for name, value in found.items():
        accepted = [GOLDEN[f"{stored}/{name}"]]
        if f"{stored}/{name}_f64" in GOLDEN:
            accepted.append(GOLDEN[f"{stored}/{name}_f64"])
        assert value.dtype == torch.float32
        # The errors of x0 and ε at small t and the prior are differences of nearly equal float32 numbers in the peer.
        tolerance = {"xstart_mse": 3e-5, "mse": 1e-3, "prior_bpd": 2e-4}.get(name, NEAR[road])
        assert relative(value.numpy(), *accepted) < tolerance, name
