import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkern.process import space_timesteps
from tests.golden_data import load

GOLDEN = load("guided_gaussian")


@pytest.mark.parametrize("key", [key for key in GOLDEN.arrays.files if key.startswith("space_timesteps/")])
def test_openai_timesteps(key):
    steps, counts = key.removeprefix("space_timesteps/T").split("_", 1)
    assert space_timesteps(int(steps), counts.replace("-", ",")) == GOLDEN[key].tolist()


def test_forms_of_the_same_description():
    expected = space_timesteps(300, "10,15,20")
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, " 10, 15,20") == expected
    assert space_timesteps(1000, 50) == space_timesteps(1000, [50]) == space_timesteps(1000, "50")


def test_ddim_stride_differs_from_even_spacing():
    assert space_timesteps(1000, "ddim25")[:3] == [0, 40, 80]
    assert space_timesteps(1000, "25")[:3] == [0, 42, 83]
    assert space_timesteps(7, "ddim7") == list(range(7))


@given(
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=1, max_size=4)))
)
def test_steps_rise_and_fill_their_sections(case):
    num_timesteps, counts = case
    sizes = [num_timesteps // len(counts) + (i < num_timesteps % len(counts)) for i in range(len(counts))]
    if sum(counts) == 0 or any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="section_counts"):
            space_timesteps(num_timesteps, counts)
        return
    kept = np.array(space_timesteps(num_timesteps, counts))
    assert (np.diff(kept) > 0).all()
    edges = np.cumsum([0, *sizes])
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        inside = kept[(kept >= start) & (kept < end)]
        assert len(inside) == count
        if count > 1:
            assert (inside[0], inside[-1]) == (start, end - 1)


@pytest.mark.parametrize(
    "bad", ["", "ddim", "ddim600", "ddim0", "10,", "a", "-5", "ddim-5", [], [0], [-1, 3], 1001, [600, 400]]
)
def test_what_cannot_be_had_is_refused(bad):
    with pytest.raises(ValueError, match="section_counts"):
        space_timesteps(1000, bad)
