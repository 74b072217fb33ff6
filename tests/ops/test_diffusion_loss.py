"""weight·mean((model_output − target)²) per sample and its gradient: what the contract's table (contract/) leaves out.

Samples of many chunks, torch's generator, scaling before rounding, and what each result may depend on.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkern import backends
from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, philox_normal
from diffkern.process.gaussian import ProcessTables
from tests.ops import oracles
from tests.ops.cases import STORAGE, assert_as_good_as_eager, error, in_layout, randn, same_bits
from tests.ops.test_q_sample import SIGMA, SIGNAL, timesteps

TABLES = ProcessTables(SIGNAL, SIGMA)
TARGETS = ("eps", "x0", "v")
# More chunks than parts; chunks of more than a stack's worth in channels last.
LARGE = [(2, 5, 61, 67), (1, 3, 230, 251), (2, 300, 5, 7)]


def loss_and_grad(*arguments, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle's loss and its gradient in model_output, computed in `dtype`, the gradient of model_output's dtype."""
    leaf = arguments[0].detach().requires_grad_()
    loss = oracles.diffusion_loss(leaf, *arguments[1:], dtype)
    (grad,) = torch.autograd.grad(scale * loss.sum(), leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_large_samples(backend, target, layout, dtype):
    """The loss has the same bits with and without the gradient."""
    for shape in LARGE:
        output, x0 = (in_layout(randn(*shape, seed=seed, dtype=dtype), layout) for seed in (0, 1))
        noise, t = philox_normal(shape, 5, stream=3), timesteps(shape[0])
        found = diffusion_loss_and_grad(output, x0, t, TABLES, scale=0.7, target=target, seed=5)
        oracle = (x0, t, SIGNAL, SIGMA, noise, target, None)
        exact = loss_and_grad(output.double(), *oracle, scale=0.7, dtype=torch.float64)
        eager = loss_and_grad(output, *oracle, scale=0.7, dtype=torch.float32)
        for f, e, other in zip(found, exact, eager, strict=True):
            assert_as_good_as_eager(f, e, other, shape)
        assert same_bits(diffusion_loss(output, x0, t, TABLES, target=target, seed=5), found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_generator_draws_what_randn_like_would(backend, layout, dtype):
    output, x0 = in_layout(randn(3, 2, 5, 5), layout), in_layout(randn(3, 2, 5, 5, seed=1, dtype=dtype), layout)
    torch.manual_seed(5)
    noise = torch.randn_like(x0)
    for target in ("eps", "v"):
        generator = torch.Generator().manual_seed(5)
        found = diffusion_loss(output, x0, timesteps(3), TABLES, target=target, generator=generator)
        assert same_bits(found, diffusion_loss(output, x0, timesteps(3), TABLES, target=target, noise=noise))


def test_x0_needs_no_noise_and_ignores_it(backend):
    output, x0, t = randn(3, 2, 5, 5), randn(3, 2, 5, 5, seed=1), timesteps(3)
    expected = diffusion_loss(output, x0, t, TABLES, target="x0")
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    for source in ({"noise": torch.full_like(x0, torch.nan)}, {"seed": 1}, {"generator": generator}):
        assert same_bits(diffusion_loss(output, x0, t, TABLES, target="x0", **source), expected)
    assert torch.equal(generator.get_state(), state)


def test_a_nan_weight_stays_in_its_sample(backend):
    output, noise, weight = randn(4, 3, 6, 6), randn(4, 3, 6, 6, seed=1), torch.tensor([1.0, torch.nan, 1.0, 1.0])
    loss, grad = diffusion_loss_and_grad(output, noise, timesteps(4), TABLES, scale=1.0, weight=weight, noise=noise)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.flatten(1).isnan().all(1).tolist() == grad.flatten(1).isnan().any(1).tolist() == loss.isnan().tolist()


def test_scale(backend):
    """A number or a tensor of any floating dtype: of the gradient alone, and before it is rounded to 16 bits."""
    output, noise, t = randn(4, 3, 6, 6), randn(4, 3, 6, 6, seed=1), timesteps(4)
    loss, grad = diffusion_loss_and_grad(output, noise, t, TABLES, scale=1.0, noise=noise)
    scales = [
        8,
        8.0,
        np.float32(8),
        torch.tensor(8.0),
        torch.tensor(8.0, dtype=torch.float16),
        torch.tensor(8.0).double(),
    ]
    for scale in scales:
        again, scaled = diffusion_loss_and_grad(output, noise, t, TABLES, scale=scale, noise=noise)
        assert same_bits(again, loss)
        assert same_bits(scaled, 8 * grad)
    near = (noise + 2e-5 * output).half()
    _, scaled = diffusion_loss_and_grad(near, noise, t, TABLES, scale=2.0**16, noise=noise)
    exact = loss_and_grad(
        near.double(), noise, t, SIGNAL, SIGMA, noise, "eps", None, scale=2.0**16, dtype=torch.float64
    )
    assert error(scaled, exact[1]) < 2.0**-10


def test_results_are_constants(backend):
    """Nothing of autograd hangs on them; the gradient goes into the model's backward pass."""
    leaf, noise, t = randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=1), timesteps(2)
    loss, grad = diffusion_loss_and_grad(3 * leaf, noise, t, TABLES, scale=0.5, noise=noise)
    assert not loss.requires_grad
    assert not grad.requires_grad
    (3 * leaf).backward(grad)
    (expected,) = torch.autograd.grad(diffusion_loss(3 * leaf, noise, t, TABLES, noise=noise).mean(), leaf)
    assert_as_good_as_eager(leaf.grad, expected.double(), expected, "chain rule")


def test_an_index_out_of_range_gives_nan_where_nobody_looks(monkeypatch):
    """As on a GPU, whose indices are not waited for: that sample is NaN for every target, and no other."""
    from diffkern.ops.diffusion_loss import reference

    monkeypatch.setattr(reference, "check_values", lambda *_: None)
    output, t = randn(4, 2, 3, 3), torch.tensor([0, 1000, -1, 999])
    with backends.use_backend("reference"):
        for target in TARGETS:
            results = diffusion_loss_and_grad(output, output, t, TABLES, scale=1.0, target=target, seed=1)
            for result in results:
                assert result.reshape(4, -1).isnan().all(1).tolist() == [False, True, True, False]
                assert result.reshape(4, -1).isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mean_of_many_values_keeps_its_digits(backend, layout):
    """A float32 sum of four million equal squares would lose three or more decimal places of them."""
    output = in_layout(torch.full((1, 4, 1024, 1024), 0.1), layout)
    loss = diffusion_loss(output, torch.zeros_like(output), torch.tensor([5]), TABLES, target="x0")
    assert error(loss, torch.tensor([float(np.float32(0.1)) ** 2], dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(backend, layout):
    output, x0, t = randn(5, 3, 37, 41), randn(5, 3, 37, 41, seed=1), timesteps(5)
    together = diffusion_loss_and_grad(
        in_layout(output, layout), x0, t, TABLES, scale=0.5, target="v", seed=3, samples=torch.arange(5) + 70
    )
    for n in range(5):
        one = slice(n, n + 1)
        alone = diffusion_loss_and_grad(
            in_layout(output[one], layout), x0[one], t[one], TABLES, scale=0.5, target="v", seed=3, samples=70 + n
        )
        assert same_bits(alone[0], together[0][one])
        assert same_bits(alone[1], together[1][one])


@pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")
def test_float64_falls_back_and_says_so():
    output = randn(2, 3, dtype=torch.float64)
    for name in ("diffusion_loss", "diffusion_loss_and_grad"):
        extra = {"scale": 1.0} if name == "diffusion_loss_and_grad" else {}
        said = backends.explain(name, output, output, timesteps(2), TABLES, seed=1, **extra)
        assert said.startswith(f"{name}: reference; not native: float64 arithmetic is the reference's")
