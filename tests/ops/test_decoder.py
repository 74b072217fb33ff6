"""Both decoders of the grey levels at t = 0, against mpmath and as probabilities."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from diffkern.backends import use_backend
from diffkern.ops import vb_terms
from diffkern.ops.vb_terms.decoder import decode
from diffkern.process import GaussianProcess
from diffkern.process.gaussian import ProcessTables

mpmath.mp.dps = 60

LEVELS = (2, 17, 256, 65536)
SIGMAS = (1e-3, 0.01, 0.1, 1.0, 30.0)
# In units of half a bin and of σ: from the middle of the bin to far outside.
OFF_BINS, OFF_SIGMAS = (0.0, 0.3, 1.0, 1.7), (0.0, 0.5, 3.0, 8.0, 40.0, 300.0)


def logistic_argument(z: mpmath.mpf) -> mpmath.mpf:
    return 2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)


def exact_nats(x0: float, difference: float, sigma: float, levels: int, decoder: str) -> float:
    """−ln of the bin's probability with 60 digits; the sum of two tails where the bin is in the middle."""
    half = mpmath.mpf(1) / (levels - 1)
    upper, lower = ((mpmath.mpf(difference) + sign * half) / mpmath.mpf(sigma) for sign in (1, -1))
    if decoder == "exact":
        survival = lambda z: mpmath.erfc(z / mpmath.sqrt(2)) / 2  # noqa: E731
    else:
        survival = lambda z: 1 / (1 + mpmath.exp(logistic_argument(z)))  # noqa: E731
    end = max(0.999, 1 - 1 / (levels - 1))
    if x0 < -end:
        probability = survival(-upper)
    elif x0 > end:
        probability = survival(lower)
    elif upper + lower > 0:
        probability = survival(lower) - survival(upper)
    else:
        probability = survival(-upper) - survival(-lower)
    nats = -mpmath.log(probability)
    return float(nats if decoder == "exact" else min(nats, -mpmath.log("1e-12")))


def cases(levels: int) -> Tensor:
    """(K, 3): x0, x0 − μ, σ."""
    half, rows = 1 / (levels - 1), []
    for x0 in sorted({-1.0, -1.0 + 2 * half * (levels // 3), 1.0}):
        for sigma in SIGMAS:
            offs = {off * half for off in OFF_BINS} | {off * sigma for off in OFF_SIGMAS}
            rows += [(x0, sign * off, sigma) for off in sorted(offs) for sign in (1, -1)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("decoder", ["tanh", "exact"])
@pytest.mark.parametrize("levels", LEVELS)
def test_float64_against_mpmath(levels, decoder):
    x0, difference, sigma = cases(levels).unbind(1)
    log_var = 2 * sigma.log()
    sigma = torch.exp(log_var / 2)  # the one that the logarithm stands for
    found = decode(difference, log_var, x0, levels, decoder).value
    wanted = torch.tensor(
        [exact_nats(*row, levels, decoder) for row in torch.stack([x0, difference, sigma], 1).tolist()],
        dtype=torch.float64,
    )
    # What is 1e-6 of a standard deviation wide is the difference of two logarithms, each rounded at its own size.
    rtol = 1e-10 if levels > 256 else 1e-13
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=2e-14)


@pytest.mark.parametrize("decoder", ["tanh", "exact"])
@pytest.mark.parametrize("levels", [17, 256])
def test_float32_against_mpmath(backend, levels, decoder):
    """A process whose first variance is σ², an x0 network, t = 0: one value a sample."""
    for sigma in (0.003, 0.03, 0.3):
        rows = cases(levels)
        rows = rows[(rows[:, 1].abs() < 2) & (rows[:, 1].abs() <= 300 * sigma)]
        x0 = rows[:, 0].float().reshape(-1, 1)
        output = (rows[:, 0] - rows[:, 1]).float().reshape(-1, 1)
        tables = GaussianProcess([0.2, 0.3]).tables()
        tables = tables._replace(log_variance=torch.full((2,), 2 * math.log(sigma), dtype=torch.float64))
        t = torch.zeros(len(x0), dtype=torch.int64)
        found = vb_terms(output, x0, t, tables, target="x0", levels=levels, decoder=decoder).vb * math.log(2)
        # The numbers that float32 holds, as the kernel is given them.
        off = (x0 - output).double().flatten().tolist()
        wanted = [exact_nats(x, d, sigma, levels, decoder) for x, d in zip(x0.flatten().tolist(), off, strict=True)]
        wanted = torch.tensor(wanted, dtype=torch.float64)
        # A small result is e^−u for u up to 27, and u has three roundings of 6e-8 of itself.
        torch.testing.assert_close(found.double(), wanted, rtol=5e-6, atol=1e-12)


@pytest.mark.parametrize("decoder", ["tanh", "exact"])
@pytest.mark.parametrize("levels", LEVELS[:-1])
def test_the_levels_have_a_probability_of_one(levels, decoder):
    x0 = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for mean in (-1.7, -0.9, 0.0, 0.31, 1.0):
        for sigma in (0.02, 0.3, 2.0):
            log_var = torch.full_like(x0, 2 * math.log(sigma))
            probability = torch.exp(-decode(x0 - mean, log_var, x0, levels, decoder).value)
            # Where "tanh" ends at 1e-12 a level, that is what it adds.
            assert abs(float(probability.sum()) - 1) < 1e-12 + (decoder == "tanh") * levels * 1e-12


@pytest.mark.parametrize("decoder", ["tanh", "exact"])
@pytest.mark.parametrize("levels", [17, 256])
def test_float32_gradients_are_those_of_float64(backend, levels, decoder):
    """Of mean and variance, per element, into the tails."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, levels, (40, 7), generator=generator) * (2 / (levels - 1)) - 1.0
    off = torch.linspace(0, 6, 40)[:, None] * torch.randn(40, 7, generator=generator)
    channels = torch.linspace(-11, 2, 280)[torch.randperm(280, generator=generator)].reshape(40, 7)
    output = torch.cat([x0 + off * torch.exp(channels / 2), channels], dim=1)
    tables, t = GaussianProcess([0.2, 0.3]).tables(), torch.zeros(40, dtype=torch.int64)
    found = _gradient(output, x0, t, tables, levels, decoder)
    with use_backend("reference"):
        wanted = _gradient(output.double(), x0.double(), t, tables, levels, decoder)
    scale = wanted.abs() + 1e-3 * wanted.abs().amax(1, keepdim=True)
    assert float(((found - wanted).abs() / scale).max()) < 3e-5


def _gradient(output: Tensor, x0: Tensor, t: Tensor, tables: ProcessTables, levels: int, decoder: str) -> Tensor:
    leaf = output.requires_grad_()
    terms = vb_terms(leaf, x0, t, tables, target="x0", variance="learned", levels=levels, decoder=decoder)
    return torch.autograd.grad(terms.vb.sum(), leaf)[0]


@pytest.mark.parametrize("log_variance", [-200.0, -80.0, -20.0, 0.0, 20.0])
def test_openai_gradients_far_outside_are_those_of_float64(backend, log_variance):
    """An end bin's infinite side has a gradient of 0, whatever a vanishing exponential is multiplied with."""
    tables = GaussianProcess(torch.full((3,), 0.1).numpy(), prediction="x0", variance="learned").tables("cpu")
    x0 = torch.tensor([-1.0, -0.2, 1.0]).repeat(20).reshape(1, 60, 1, 1)
    off = 10.0 ** torch.linspace(0, 8, 20).repeat_interleave(3).reshape(x0.shape)
    for sign in (1, -1):
        output = torch.cat([x0 + sign * off, torch.full_like(x0, log_variance)], dim=1)
        found, exact = output.clone().requires_grad_(), output.double().requires_grad_()
        vb_terms(found, x0, torch.zeros(1, dtype=torch.int64), tables, target="x0").vb.sum().backward()
        difference, variance = (x0 - exact[:, :60], exact[:, 60:])
        bits = decode(difference.detach(), variance.detach(), x0, 256, "tanh")
        expected = torch.cat([-bits.of_difference, bits.of_log_var], dim=1) / (60 * math.log(2))
        torch.testing.assert_close(found.grad.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("decoder", ["tanh", "exact"])
def test_nan_in_the_variance_stays(backend, decoder):
    tables = GaussianProcess(torch.full((3,), 0.1).numpy(), variance="learned").tables("cpu")
    output, x0 = torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 4, 4)
    output[0, 3, 0, 0] = math.nan
    output.requires_grad_()
    value = vb_terms(output, x0, torch.zeros(2, dtype=torch.int64), tables, noise=x0, decoder=decoder).vb
    value.sum().backward()
    assert value.isnan().tolist() == [True, False]
    assert output.grad[0, 3, 0, 0].isnan()
    assert output.grad[1].isfinite().all()


@pytest.mark.parametrize("off", [0.0, 0.4, 60.0])
@pytest.mark.parametrize("log_variance", [5.0, 20.0, 40.0, 80.0])
def test_exact_in_a_bin_that_is_narrow_against_sigma(backend, log_variance, off):
    """−ln P ≈ c²/2 + ½ ln 2π + ln σ − ln(2h) there, where a difference of two Φ has no digits."""
    tables = GaussianProcess(torch.full((3,), 0.1).numpy(), prediction="x0", variance="learned").tables("cpu")
    x0 = torch.full((1, 3, 2, 2), 0.2)
    output = torch.cat([x0 - off, torch.full_like(x0, log_variance)], dim=1).requires_grad_()
    value = vb_terms(output, x0, torch.zeros(1, dtype=torch.int64), tables, target="x0", decoder="exact").vb
    value.sum().backward()
    sigma = mpmath.exp(mpmath.mpf(log_variance) / 2)
    off = float((x0 - output.detach()[:, :3]).double().mean())
    nats = mpmath.mpf(exact_nats(0.2, off, float(sigma), 256, "exact"))
    torch.testing.assert_close(value.item(), float(nats / mpmath.log(2)), rtol=1e-6, atol=0)
    c2 = float((off / sigma) ** 2)
    unit = 1 / (12 * math.log(2))
    expected = torch.tensor([-off / float(sigma) ** 2 * unit, (1 - c2) / 2 * unit])
    torch.testing.assert_close(output.grad[0, [0, 3], 0, 0], expected, rtol=1e-4, atol=1e-9)
