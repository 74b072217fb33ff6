"""Whether the noise looks like noise: moments, distribution, and no trace between neighbouring counters.

The numbers are fixed (no seed is drawn), so the bounds, five standard errors, are met always or never.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffkern.ops import philox_normal

SIZE = 10**6


def draw(**counter: int) -> np.ndarray:
    return philox_normal((1, SIZE), counter.pop("seed", 0), **counter).numpy()[0].astype(np.float64)


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return draw()


def test_moments(normals):
    """Mean 0, variance 1, skewness 0, kurtosis 3, sixth moment 15."""
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        assert abs((normals**power).mean() - expected) < 5 * (variance / SIZE) ** 0.5


@pytest.mark.parametrize("lane", range(4))
def test_distribution_of_each_word_of_the_counter(normals, lane):
    assert stats.kstest(normals[lane::4], "norm").pvalue > 1e-3


def test_distribution_over_samples_and_draws():
    """The first elements of many samples: what differs is only the index."""
    across_samples = philox_normal((200_000, 2), 3).numpy().reshape(-1)
    assert stats.kstest(across_samples, "norm").pvalue > 1e-3
    across_draws = np.array([philox_normal((1, 4), 3, draw=k).numpy()[0] for k in range(5000)]).reshape(-1)
    assert stats.kstest(across_draws, "norm").pvalue > 1e-3


def test_tails(normals):
    """As many values beyond 3 and 4 as there should be, and none beyond what 32 bits can give."""
    for bound in (3.0, 4.0):
        expected = 2 * stats.norm.sf(bound) * SIZE
        assert abs((np.abs(normals) > bound).sum() - expected) < 5 * expected**0.5
    assert np.abs(normals).max() <= (2 * 33 * np.log(2)) ** 0.5


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(np.corrcoef(a, b)[0, 1]) * len(a) ** 0.5


def test_neighbours_are_independent(normals):
    for lag in (1, 2, 3, 4, 8, 32, 128):
        for f in (np.asarray, np.abs):
            assert correlation(f(normals[:-lag]), f(normals[lag:])) < 5, lag


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"seed": 2**32}, {"draw": 1}, {"samples": 1}, {"samples": 2**32}, {"stream": 1}],
    ids=lambda changed: "-".join(f"{k}{v}" for k, v in changed.items()),
)
def test_neighbouring_counters_are_independent(normals, changed):
    other = draw(**changed)
    assert correlation(normals, other) < 5
    assert correlation(np.abs(normals), np.abs(other)) < 5
