"""The integers: equal to Philox4x32-10 everywhere, and a function of nothing but their counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkern.backends import use_backend
from diffkern.ops import philox_uint32
from diffkern.ops.philox_normal.reference import philox_words
from tests.ops.philox import expected_words, philox, philox_inverse

ZEROS = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
ONES = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_known_answers_of_the_tests_own_philox():
    assert philox(0, np.zeros(4)).tolist() == ZEROS
    assert philox(2**64 - 1, np.full(4, 2**32 - 1, dtype=np.uint64)).tolist() == ONES
    words = np.random.default_rng(0).integers(0, 2**32, (1000, 4), dtype=np.uint64)
    np.testing.assert_array_equal(philox(12345, philox_inverse(12345, words)), words)


def test_known_answer_for_zeros(backend):
    assert philox_uint32((1, 4), 0).tolist() == [ZEROS]


def test_known_answer_for_ones_but_the_block(backend):
    """c1 = c2 = c3 = 2^32 − 1 and the key all ones; the block is the first one, since the last would need 64 GiB."""
    words = philox_uint32((1, 4), 2**64 - 1, draw=2**32 - 1, samples=2**48 - 1, stream=2**16 - 1)
    assert words.tolist() == [philox(2**64 - 1, np.array([0, *[2**32 - 1] * 3])).tolist()]


def test_known_answer_for_ones_in_the_reference(monkeypatch):
    """The reference's rounds on the last block of all."""
    real = torch.arange
    monkeypatch.setattr(torch, "arange", lambda end, **kwargs: real(end, **kwargs) + (2**32 - 1 if end == 1 else 0))
    scalar = torch.tensor(0)
    words = philox_words(1, 4, scalar - 1, scalar + 2**32 - 1, torch.tensor([2**48 - 1]), 2**16 - 1)
    assert words.tolist() == [ONES]


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 1), (2, 7), (3, 2, 5), (2, 3, 5, 7), (1, 2, 3, 4, 5), (257, 3)])
@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_words_are_those_of_the_counter(backend, shape, seed):
    for draw, samples, stream in [(0, 0, 0), (3, 11, 2), (2**31, 2**32 - 2, 65535), (2**32 - 1, 2**40, 1)]:
        words = philox_uint32(shape, seed, draw=draw, samples=samples, stream=stream)
        indices = [samples + n for n in range(shape[0])]
        np.testing.assert_array_equal(words.numpy(), expected_words(shape, seed, draw, indices, stream))


def test_sample_indices_beyond_32_bits(backend):
    """The index's high half enters the counter, as an offset that crosses 2^32 and as explicit indices."""
    samples = [2**32 - 1, 2**32, 2**32 + 1]
    exact = expected_words((3, 9), 5, 0, samples, 4)
    np.testing.assert_array_equal(philox_uint32((3, 9), 5, samples=2**32 - 1, stream=4).numpy(), exact)
    np.testing.assert_array_equal(philox_uint32((3, 9), 5, samples=torch.tensor(samples), stream=4).numpy(), exact)
    assert len({tuple(row) for row in exact.tolist()}) == 3


def test_backends_agree_on_a_large_tensor():
    with use_backend("reference"):
        reference = philox_uint32((3, 5, 61, 67), 99, draw=2, samples=1000, stream=3)
    with use_backend("native"):
        assert torch.equal(philox_uint32((3, 5, 61, 67), 99, draw=2, samples=1000, stream=3), reference)


def test_empty_shapes(backend):
    for shape in [(0,), (0, 3), (2, 0), (2, 3, 0, 4)]:
        words = philox_uint32(shape, 1)
        assert words.shape == shape
        assert words.dtype == torch.int64
