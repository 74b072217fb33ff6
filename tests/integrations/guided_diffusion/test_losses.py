"""normal_kl and the grey levels' log-likelihood: stored numbers, the ends of their ranges, and float32."""

import math

import numpy as np
import pytest
import torch

from diffkern.integrations.guided_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from diffkern.integrations.guided_diffusion.nn import mean_flat
from tests.integrations.guided_diffusion.exact_losses import log_likelihood
from tests.integrations.guided_diffusion.replay import GOLDEN, tensor

LEAST = math.log(1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fit", ["near", "far"])
def test_stored_log_likelihoods_and_their_gradients(fit, dtype):
    """float32 is as near to the peer's float64 as float64 is: what is left is the peer's 1 − tanh near 1e-12."""
    x, means, log_scales = (
        tensor(f"losses/discretized_{fit}/{name}").to(dtype) for name in ("x", "means", "log_scales")
    )
    means.requires_grad_()
    log_scales.requires_grad_()
    value = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    value.sum().backward()
    assert value.dtype == dtype
    for name, found in (
        ("out", value.detach()),
        ("grad_means", means.grad),
        ("grad_log_scales", log_scales.grad),
    ):
        stored = GOLDEN[f"losses/discretized_{fit}/{name}_f64"]
        np.testing.assert_allclose(found.numpy(), stored, rtol=2e-4, atol=2e-5 * max(1, np.abs(stored).max() * 1e-2))


def test_stored_kl_and_cdf():
    stored = [tensor(f"losses/normal_kl/{name}") for name in ("mean1", "logvar1", "mean2", "logvar2")]
    np.testing.assert_allclose(normal_kl(*stored), GOLDEN["losses/normal_kl/out"], rtol=2e-5, atol=1e-6)
    standard = normal_kl(*stored[:2], 0.0, 0.0)
    np.testing.assert_allclose(standard, GOLDEN["losses/normal_kl/out_vs_standard"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        approx_standard_normal_cdf(tensor("losses/cdf_x")), GOLDEN["losses/cdf"], rtol=2e-6, atol=1e-7
    )


def test_kl_of_numbers_and_broadcasting_tensors():
    mean, log_variance = torch.tensor([[0.5], [-1.0]]), torch.tensor([0.3, -2.0, 0.0])
    p, q = (torch.distributions.Normal(m, s) for m, s in ((mean, 0.5), (torch.zeros(()), (log_variance / 2).exp())))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(normal_kl(mean, 2 * math.log(0.5), 0.0, log_variance), expected)
    assert normal_kl(0.0, log_variance, 0.0, log_variance).abs().max() == 0
    with pytest.raises(TypeError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


def test_gradients_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40,), generator=generator).double() / 127.5 - 1
    x[:2] = torch.tensor([-1.0, 1.0])
    means = (x + 0.02 * torch.randn(40, generator=generator, dtype=torch.float64)).requires_grad_()
    log_scales = (0.5 * torch.randn(40, generator=generator, dtype=torch.float64) - 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_gaussian_log_likelihood(x, means=m, log_scales=s), (means, log_scales)
    )
    arguments = [torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(normal_kl, arguments)
    assert torch.autograd.gradgradcheck(normal_kl, arguments)


def test_float32_keeps_its_digits_where_two_cdfs_are_nearly_equal():
    """A wide Gaussian's bins, and the tails: plain float32 gives these to one digit or none."""
    log_scales = torch.tensor([0.0, 3.0, 6.0, -3.0, -3.0])
    x, means = torch.tensor([0.5, 0.1, -0.3, 0.2, 0.3]), torch.tensor([-0.5, 0.0, 0.4, -0.02, 0.1])
    found = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    exact = log_likelihood(x.double(), means.double(), log_scales.double())
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    assert (found > LEAST).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_breaks_at_extremes(dtype):
    """Scales from e^-500 to e^500 and means far off: a probability between 1e-12 and 1, and finite gradients."""
    values = torch.tensor([-1e6, -3.0, -1.0, -0.9, 0.0, 1 / 255, 1.0, 1e6], dtype=dtype)
    scales = torch.tensor([-500.0, -60.0, -25.0, -3.0, 0.0, 40.0, 500.0], dtype=dtype)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    x, means, log_scales = (v.clone() for v in torch.meshgrid(levels, values, scales, indexing="ij"))
    means.requires_grad_()
    log_scales.requires_grad_()
    value = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    value.sum().backward()
    assert ((value >= LEAST * (1 + 1e-6)) & (value <= 0)).all()
    assert means.grad.isfinite().all()
    assert log_scales.grad.isfinite().all()
    assert (means.grad[value <= LEAST] == 0).all()


def test_shapes_must_match():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"means has shape \(3,\); it must be x's, \(2, 3\)"):
        discretized_gaussian_log_likelihood(x, means=torch.zeros(3), log_scales=x)
    with pytest.raises(ValueError, match=r"log_scales has shape"):
        discretized_gaussian_log_likelihood(x, means=x, log_scales=torch.zeros(2, 1))


def test_mean_flat():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert mean_flat(x).tolist() == [5.5, 17.5]
    assert mean_flat(x[:, 0, 0]).tolist() == [0.0, 12.0]
    assert mean_flat(x[:0]).shape == (0,)
