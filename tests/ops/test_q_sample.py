"""x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε: values in every dtype and layout, and where ε comes from."""

from __future__ import annotations

import pytest
import torch

from diffkern.backends import unavailable, use_backend
from diffkern.ops import philox_normal, q_sample
from tests.ops import oracles
from tests.ops.cases import (
    DTYPES,
    LAYOUTS,
    Untouched,
    assert_as_good_as_eager,
    in_layout,
    memory_format,
    randn,
    same_bits,
)

SHAPES = [(1,), (7,), (3, 5), (2, 7, 13), (3, 5, 7, 7), (2, 1, 9, 9), (2, 6, 1, 1), (2, 3, 4, 5, 6), (257, 2, 3, 3)]
EMPTY = [(0,), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)]
SIGNAL, SIGMA = oracles.alphas_cumprod_tables()


def timesteps(n: int) -> torch.Tensor:
    """Both ends of the schedule and something between."""
    return (torch.arange(n) * 613 + 999) % 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_from_a_counter(backend, layout, dtype):
    """The normals of philox_normal, in float32 before x_t is rounded; ε is returned rounded."""
    counter = {"seed": 2**63 + 5, "draw": 3, "samples": 2**33, "stream": 9}
    for shape in [*SHAPES, *EMPTY, (2, 5, 61, 67)]:
        x0, t = in_layout(randn(*shape, seed=1, dtype=dtype), layout), timesteps(shape[0])
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        normals = philox_normal(shape, 2**63 + 5, draw=3, samples=2**33, stream=9, dtype=computed)
        with Untouched(x0, t, SIGNAL, SIGMA):
            x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, **counter, return_noise=True)
        exact = oracles.q_sample(x0, t, SIGNAL, SIGMA, normals, torch.float64)
        assert_as_good_as_eager(x_t, exact, oracles.q_sample(x0, t, SIGNAL, SIGMA, normals, dtype), shape)
        assert same_bits(eps, philox_normal(shape, 2**63 + 5, draw=3, samples=2**33, stream=9, dtype=dtype))
        assert memory_format(eps) == memory_format(x_t) == memory_format(x0)
        assert same_bits(q_sample(x0, t, SIGNAL, SIGMA, **counter), x_t)


def test_noise_given_back_makes_the_same_x_t(backend):
    x0, t = randn(3, 2, 9, 9), timesteps(3)
    x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, seed=1, return_noise=True)
    again, given = q_sample(x0, t, SIGNAL, SIGMA, noise=eps, return_noise=True)
    assert same_bits(again, x_t)
    assert same_bits(given, eps)


def test_batches_may_be_split_anywhere(backend):
    """Each sample's result depends on its own x0, t and index alone: on any split, in either memory format."""
    x0, t = randn(5, 3, 20, 30), timesteps(5)
    whole = q_sample(x0, t, SIGNAL, SIGMA, seed=4, samples=10)
    for layout in ("contiguous", "channels_last"):
        parts = [
            q_sample(in_layout(x0[part], layout), t[part], SIGNAL, SIGMA, seed=4, samples=10 + part.start)
            for part in (slice(0, 1), slice(1, 3), slice(3, 5))
        ]
        assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_generator_draws_what_randn_like_draws(backend, layout, dtype):
    x0, t = in_layout(randn(2, 6, 7, 9, dtype=dtype), layout), timesteps(2)
    x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, generator=torch.Generator().manual_seed(5), return_noise=True)
    torch.manual_seed(5)
    expected = torch.randn_like(x0)
    assert same_bits(eps, expected)
    assert same_bits(x_t, q_sample(x0, t, SIGNAL, SIGMA, noise=expected))


def test_float32_tables_and_strided_timesteps(backend):
    x0, noise, t = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), timesteps(6)[::2]
    tables = SIGNAL.float(), SIGMA.float()
    exact = oracles.q_sample(x0, t, *tables, noise, torch.float64)
    eager = oracles.q_sample(x0, t, *tables, noise, torch.float32)
    assert_as_good_as_eager(q_sample(x0, t, *tables, noise=noise), exact, eager, "float32 tables")
    strided = torch.stack([SIGNAL, SIGMA], dim=1).unbind(1)
    expected = q_sample(x0, t, SIGNAL, SIGMA, noise=noise)
    assert same_bits(q_sample(x0, t, *strided, noise=noise), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf_stay_where_they_are(backend, layout, bad):
    x0 = randn(3, 4, 6, 6)
    clean = q_sample(in_layout(x0, layout), timesteps(3), SIGNAL, SIGMA, seed=1)
    x0[1, 2, 3, 3] = bad
    spoilt = q_sample(in_layout(x0, layout), timesteps(3), SIGNAL, SIGMA, seed=1)
    assert not spoilt[1, 2, 3, 3].isfinite()
    spoilt[1, 2, 3, 3] = clean[1, 2, 3, 3]
    assert same_bits(spoilt, clean)


def test_float16_near_its_end(backend):
    x0 = torch.full((1, 2, 3, 3), 6e4, dtype=torch.float16)
    x_t = q_sample(x0, torch.tensor([0]), SIGNAL, SIGMA, noise=torch.zeros_like(x0))
    assert same_bits(x_t, (SIGNAL[0] * 6e4).half().expand(x0.shape))


@pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
def test_freed_memory_is_an_error():
    x0, noise = torch.zeros(2, 4), torch.zeros(2, 4)
    noise.untyped_storage().resize_(0)
    with use_backend("native"), pytest.raises(RuntimeError, match="freed"):
        q_sample(x0, torch.zeros(2, dtype=torch.int64), SIGNAL, SIGMA, noise=noise)
