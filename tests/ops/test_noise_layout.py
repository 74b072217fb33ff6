"""Layout version 1 (docs/noise.md) as literal numbers: users' seeds are files somewhere, and must keep their meaning.

No number here may change while NOISE_LAYOUT_VERSION is 1.
"""

from __future__ import annotations

import pytest
import torch

import diffkern
from diffkern.ops import philox_normal, philox_uint32, q_sample

# Both halves of the key, a draw, a sample index beyond 32 bits, a stream, and a second block of four.
ADDRESS = {"seed": 2**40 + 5, "draw": 3, "samples": 2**33 + 7, "stream": 2}
WORDS = [0x42A9D278, 0x58E44D17, 0x47051E38, 0x8A083337, 0x819E9B26, 0x41FBE392]
NORMALS = [-0.941013836166072, 1.3437025944940646, -1.5530865491010746, -0.3903257863380713]
# Three samples of five elements: the fifth begins a block of its own.
BATCH = [
    [0xEE089B71, 0xCA005F87, 0x963F4237, 0x0D567ADA, 0x99291873],
    [0x05071867, 0x65C1ADCC, 0x828A39AF, 0x5B2B2CDD, 0x756599EC],
    [0x4DD9D6D5, 0x091B1C29, 0x2D90852E, 0xACB6F6E9, 0xD3A031FE],
]


def test_this_is_version_1():
    assert diffkern.NOISE_LAYOUT_VERSION == 1


def test_words(backend):
    assert philox_uint32((1, 6), **ADDRESS).tolist() == [WORDS]
    assert philox_uint32((3, 5), 7, samples=11, stream=3).tolist() == BATCH


def test_normals(backend):
    normals = philox_normal((1, 4), **ADDRESS, dtype=torch.float64)
    assert normals.tolist() == [pytest.approx(NORMALS, rel=1e-14)]


def test_elements_are_counted_in_contiguous_order(backend):
    """(2, 2) channels last and contiguous: the same words, wherever they lie."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        shape = (1, 2, 1, 2)
        normals = philox_normal(shape, **ADDRESS, dtype=torch.float64, memory_format=memory_format)
        assert normals.flatten().tolist() == pytest.approx(NORMALS, rel=1e-14)


def test_training_noise_is_stream_3(backend):
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    x0, t = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    eps = q_sample(x0, t, zero, one, seed=7, samples=11)
    assert torch.equal(eps, philox_normal((3, 5), 7, samples=11, stream=3, dtype=torch.float64))
