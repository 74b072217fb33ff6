import math

import pytest
import torch

from diffkern.nn import sinusoidal_embedding


@pytest.mark.parametrize("order", ["cos_sin", "sin_cos"])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_equals_the_formula(order, freq_shift):
    t, dim = torch.tensor([0, 1, 7, 999]), 32
    got = sinusoidal_embedding(t, dim, order=order, freq_shift=freq_shift)
    assert got.dtype == torch.float32
    for n, time in enumerate(t.tolist()):
        for i in range(dim // 2):
            angle = time * 10000.0 ** (-i / (dim // 2 - freq_shift))
            cos, sin = (i, dim // 2 + i) if order == "cos_sin" else (dim // 2 + i, i)
            # float32 angles up to 999 are exact to 999·2⁻²³
            assert got[n, cos].item() == pytest.approx(math.cos(angle), abs=1.5e-4)
            assert got[n, sin].item() == pytest.approx(math.sin(angle), abs=1.5e-4)


def test_shifted_frequencies_end_at_one_over_the_period():
    last = sinusoidal_embedding(torch.tensor([1.0]), 16, order="sin_cos", freq_shift=1)[0, 7]
    assert last.item() == pytest.approx(1e-4, rel=1e-5)


def test_takes_times_of_any_dtype_and_none_at_all():
    times = torch.tensor([0, 3, 250])
    for dtype in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(sinusoidal_embedding(times.to(dtype), 8), sinusoidal_embedding(times, 8))
    assert not torch.equal(sinusoidal_embedding(times + 0.5, 8), sinusoidal_embedding(times, 8))
    assert sinusoidal_embedding(times[:0], 8).shape == (0, 8)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [({"dim": 7}, "dim"), ({"dim": 2, "freq_shift": 1}, "dim"), ({"dim": 8, "order": "sin"}, "order")],
)
def test_says_which_argument_is_wrong(kwargs, name):
    with pytest.raises(ValueError, match=name):
        sinusoidal_embedding(torch.zeros(2), **kwargs)
