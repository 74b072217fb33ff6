"""Gradients of x0, the noise and the tables; noise from a counter is computed again in the backward pass."""

from __future__ import annotations

import pytest
import torch

from diffkern.backends import use_backend
from diffkern.ops import philox_normal, q_sample
from tests.ops import oracles
from tests.ops.cases import STORAGE, assert_as_good_as_eager, randn, same_bits
from tests.ops.test_q_sample import SIGMA, SIGNAL, timesteps


def small_tables(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Nine timesteps, so that samples share some and leave others out."""
    return SIGNAL[::120].to(dtype).requires_grad_(), SIGMA[::120].to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", STORAGE)
def test_noise_from_a_counter(backend, dtype):
    shape, tables = (5, 3, 9, 11), small_tables(torch.float32)
    x0, t = randn(*shape).to(dtype).requires_grad_(), timesteps(5) % 9
    dy = randn(*shape, seed=1).to(dtype)
    found = torch.autograd.grad(q_sample(x0, t, *tables, seed=3, draw=2, samples=7), [x0, *tables], dy)
    noise = philox_normal(shape, 3, draw=2, samples=7, stream=3)
    exact = torch.autograd.grad(oracles.q_sample(x0, t, *tables, noise, torch.float64), [x0, *tables], dy.double())
    for f, e in zip(found, exact, strict=True):
        assert_as_good_as_eager(f, e, e.to(f.dtype), dtype)


def test_returned_noise_is_a_constant(backend):
    """The target of a loss: a gradient to x0 through it would be wrong."""
    x0 = randn(2, 3, 4, 4).requires_grad_()
    x_t, eps = q_sample(x0, timesteps(2), SIGNAL, SIGMA, seed=1, return_noise=True)
    assert not eps.requires_grad
    (found,) = torch.autograd.grad((x_t * eps).sum(), x0)
    t = timesteps(2)
    assert_as_good_as_eager(found, oracles.expand(SIGNAL[t], x0) * eps, found, "constant noise")


def test_nan_stays_in_its_sample(backend):
    t = torch.tensor([4, 2, 4])
    tables = small_tables()
    dy = randn(3, 2, 4, 4)
    dy[1, 0, 0, 0] = torch.nan
    x0 = randn(3, 2, 4, 4).requires_grad_()
    dx0, dsignal, dsigma = torch.autograd.grad(q_sample(x0, t, *tables, seed=1), [x0, *tables], dy)
    assert bool(dx0[[0, 2]].isfinite().all())
    for gradient in (dsignal, dsigma):
        assert gradient.isnan().nonzero().flatten().tolist() == [2]


def test_repeatable(backend):
    x0, tables = randn(64, 3, 16, 16).requires_grad_(), small_tables()
    t = timesteps(64) % 9
    results = [torch.autograd.grad(q_sample(x0, t, *tables, seed=1).square().sum(), [x0, *tables]) for _ in range(2)]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck(backend):
    """And the second derivatives, which follow from the backward pass being plain torch."""
    for shape in [(3,), (3, 2), (3, 2, 2, 3)]:
        x0 = randn(*shape, dtype=torch.float64).requires_grad_()
        noise = randn(*shape, seed=1, dtype=torch.float64).requires_grad_()
        tables, t = small_tables(), torch.tensor([1, 3, 1])
        given = lambda x0, noise, a, b, t=t: q_sample(x0, t, a, b, noise=noise)  # noqa: E731
        counted = lambda x0, a, b, t=t: q_sample(x0, t, a, b, seed=3)  # noqa: E731
        assert torch.autograd.gradcheck(given, (x0, noise, *tables))
        assert torch.autograd.gradcheck(counted, (x0, *tables))
        assert torch.autograd.gradgradcheck(given, (x0, noise, *tables))


def test_backends_agree():
    x0, t = randn(2, 3, 33, 35).requires_grad_(), timesteps(2)
    results = []
    for name in ("reference", "native"):
        with use_backend(name):
            results.append(torch.autograd.grad(q_sample(x0, t, SIGNAL, SIGMA, seed=5).sum(), x0)[0])
    assert same_bits(*results)
