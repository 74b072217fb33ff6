"""Gradients of diffusion_loss beside the contract's (contract/): the one pass, small numbers, second derivatives."""

from __future__ import annotations

import pytest
import torch

from diffkern.ops import diffusion_loss, diffusion_loss_and_grad
from diffkern.process.gaussian import ProcessTables
from tests.ops.cases import assert_as_good_as_eager, randn, same_bits
from tests.ops.test_diffusion_loss import TABLES, TARGETS, loss_and_grad
from tests.ops.test_q_sample import timesteps
from tests.ops.test_q_sample_gradients import small_tables


def test_the_gradient_is_that_of_the_one_pass(backend):
    """The mean over the batch times a loss scaler's factor, bit for bit."""
    output, noise, t = randn(4, 3, 7, 7, dtype=torch.float16).requires_grad_(), randn(4, 3, 7, 7, seed=1), timesteps(4)
    loss = diffusion_loss(output, noise, t, TABLES, noise=noise)
    (found,) = torch.autograd.grad(loss.mean() * 1024, output)
    again, expected = diffusion_loss_and_grad(output, noise, t, TABLES, scale=1024 / 4, noise=noise)
    assert same_bits(found, expected)
    assert same_bits(loss.detach(), again)


def test_a_scaled_loss_does_not_lose_its_gradient_in_float16(backend):
    """Unscaled, the gradient is below float16's smallest number: the scale must reach it before the rounding."""
    output, noise = randn(1, 3, 64, 64, dtype=torch.float16).requires_grad_(), randn(1, 3, 64, 64, seed=1)
    near = (noise + 1e-3 * output).half().detach().requires_grad_()
    t = timesteps(1)
    (found,) = torch.autograd.grad(2.0**14 * diffusion_loss(near, noise, t, TABLES, noise=noise).mean(), near)
    oracle = (noise, t, *TABLES[:2], noise, "eps", None)
    _, exact = loss_and_grad(near.double(), *oracle, scale=2.0**14, dtype=torch.float64)
    _, eager = loss_and_grad(near, *oracle, scale=2.0**14, dtype=torch.float32)
    assert_as_good_as_eager(found, exact, eager, "scaled")


@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(target):
    """The reference in float64."""
    for shape in [(3,), (3, 2), (3, 2, 2, 3)]:
        output, x0, noise = (randn(*shape, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))
        weight, tables = randn(3, seed=4, dtype=torch.float64).requires_grad_(), small_tables()
        t = torch.tensor([1, 3, 1])

        def given(output, x0, noise, weight, a, b, t=t):
            return diffusion_loss(output, x0, t, ProcessTables(a, b), target=target, weight=weight, noise=noise)

        def counted(output, x0, a, b, t=t):
            return diffusion_loss(output, x0, t, ProcessTables(a, b), target=target, seed=3)

        assert torch.autograd.gradcheck(given, (output, x0, noise, weight, *tables))
        assert torch.autograd.gradcheck(counted, (output, x0, *tables))


def test_there_is_no_second_derivative(backend):
    """Rather than a wrong one."""
    output = randn(2, 3).requires_grad_()
    loss = diffusion_loss(output, output.detach(), timesteps(2), TABLES, seed=1)
    (first,) = torch.autograd.grad(loss.sum(), output, create_graph=True)
    with pytest.raises(RuntimeError, match="diffusion_loss_and_grad has no derivative"):
        torch.autograd.grad(first.sum(), output)
