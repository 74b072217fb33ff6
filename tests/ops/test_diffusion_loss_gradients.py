"""Gradients of diffusion_loss: the network's output, the weights, and what the target is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.backends import use_backend
from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, philox_normal
from diffkern.process.gaussian import ProcessTables
from tests.ops import oracles
from tests.ops.cases import (
    LAYOUTS,
    STORAGE,
    Untouched,
    assert_as_good_as_eager,
    in_layout,
    memory_format,
    randn,
    same_bits,
)
from tests.ops.test_diffusion_loss import TABLES, TARGETS
from tests.ops.test_q_sample import EMPTY, SHAPES, timesteps
from tests.ops.test_q_sample_gradients import small_tables


def gradients(loss: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """None, where a leaf is not read, as zeros."""
    found = torch.autograd.grad(loss, leaves, dy.to(loss.dtype), allow_unused=True)
    return [torch.zeros_like(leaf) if f is None else f for leaf, f in zip(leaves, found, strict=True)]


def oracle_gradients(leaves: list[Tensor], t: Tensor, target: str, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of output, x0, noise, weight and the tables: in float64, not rounded to the leaves' dtypes, and in float32."""
    results = []
    for computed in (torch.float64, torch.float32):
        exact = computed == torch.float64
        copies = [(leaf.detach().double() if exact else leaf.detach()).requires_grad_() for leaf in leaves]
        output, x0, noise, weight, *tables = copies
        loss = oracles.diffusion_loss(output, x0, t, *tables, noise, target, weight, computed)
        results.append(gradients(loss, copies, dy))
    return results[0], results[1]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_all_gradients(backend, target, layout, dtype):
    for shape in [*SHAPES, *EMPTY]:
        output, x0, noise = (
            in_layout(randn(*shape, seed=seed).to(dtype), layout).requires_grad_() for seed in range(3)
        )
        weight, tables = randn(shape[0], seed=4).requires_grad_(), small_tables()
        dy, t = randn(shape[0], seed=3), timesteps(shape[0]) % 9
        leaves = [output, x0, noise, weight, *tables]
        with Untouched(*leaves, t, dy):
            loss = diffusion_loss(output, x0, t, ProcessTables(*tables), target=target, weight=weight, noise=noise)
            found = gradients(loss, leaves, dy)
        exact, eager = oracle_gradients(leaves, t, target, dy)
        assert memory_format(found[0]) == memory_format(output)
        for leaf, f, e, other in zip(leaves, found, exact, eager, strict=True):
            assert f.dtype == leaf.dtype
            # The tables are float64, what their gradients are made of is float32.
            assert_as_good_as_eager(f if f.dtype == dtype else f.float(), e, other, (shape, target))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("target", ["eps", "v"])
def test_noise_from_a_counter(backend, target, dtype):
    """It is computed again for the gradient of the output and of the tables."""
    shape, tables, t = (5, 3, 9, 11), small_tables(torch.float32), timesteps(5) % 9
    output, x0 = (randn(*shape, seed=seed).to(dtype).requires_grad_() for seed in range(2))
    leaves, dy = [output, x0, *tables], randn(5, seed=3)
    counter = {"draw": 2, "samples": 7}
    loss = diffusion_loss(output, x0, t, ProcessTables(*tables), target=target, seed=3, **counter)
    found = gradients(loss, leaves, dy)
    noise = philox_normal(shape, 3, **counter, stream=3)
    exact, eager = oracle_gradients([output, x0, noise, torch.ones(5), *tables], t, target, dy)
    for f, e, other in zip(found, [*exact[:2], *exact[4:]], [*eager[:2], *eager[4:]], strict=True):
        assert_as_good_as_eager(f, e, other, (target, dtype))


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
    exact, eager = oracle_gradients([near, noise, noise, torch.ones(1), *TABLES], t, "eps", torch.tensor([2.0**14]))
    assert_as_good_as_eager(found, exact[0], eager[0], "scaled")


def test_nan_stays_in_its_sample(backend):
    tables, t, dy = small_tables(), torch.tensor([4, 2, 4]), torch.tensor([1.0, torch.nan, 1.0])
    output = randn(3, 2, 4, 4).requires_grad_()
    loss = diffusion_loss(output, randn(3, 2, 4, 4, seed=1), t, ProcessTables(*tables), target="v", seed=1)
    d_output, *of_tables = torch.autograd.grad(loss, [output, *tables], dy)
    assert d_output.flatten(1).isfinite().all(1).tolist() == [True, False, True]
    for gradient in of_tables:
        assert gradient.isnan().nonzero().flatten().tolist() == [2]


def test_repeatable(backend):
    output, tables, t = randn(64, 3, 16, 16).requires_grad_(), small_tables(), timesteps(64) % 9
    results = []
    for _ in range(2):
        loss = diffusion_loss(output, output.detach(), t, ProcessTables(*tables), target="v", seed=1)
        results.append(torch.autograd.grad(loss.sum(), [output, *tables]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


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


def test_backends_agree():
    output, x0, t = randn(2, 3, 33, 35).requires_grad_(), randn(2, 3, 33, 35, seed=1), timesteps(2)
    results = []
    for name in ("reference", "native"):
        with use_backend(name):
            results.append(torch.autograd.grad(diffusion_loss(output, x0, t, TABLES, seed=5).sum(), output)[0])
    assert_as_good_as_eager(results[1], results[0].double(), results[0], "backends")
