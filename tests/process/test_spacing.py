import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkern.process import SPACINGS, space_timesteps
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
        with pytest.raises(ValueError, match="steps"):
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
    "bad",
    [
        "",
        "ddim",
        "ddim600",
        "ddim0",
        "10,",
        "a",
        "-5",
        "ddim-5",
        [],
        [0],
        [-1, 3],
        1001,
        [600, 400],
        2.5,
        [2.5, 2],
        None,
    ],
)
def test_what_cannot_be_had_is_refused(bad):
    with pytest.raises(ValueError, match="steps"):
        space_timesteps(1000, bad)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_diffusers_where_it_is_installed(spacing):
    """For every number of steps: the schedulers that keep S of them, and those that drop the lowest of S + 1."""
    schedulers = pytest.importorskip("diffusers").schedulers
    for total in (1000, 777):
        peer = schedulers.DDIMScheduler(total, timestep_spacing=spacing, steps_offset=0)
        for steps in [*range(1, 60), 100, 333, total - 1, total]:
            peer.set_timesteps(steps)
            expected = peer.timesteps.tolist()[::-1]
            assert space_timesteps(total, steps, spacing=spacing) == expected[-steps:], steps
    dropping = schedulers.DPMSolverMultistepScheduler(1000, timestep_spacing=spacing)
    for steps in (1, 7, 20, 99):
        dropping.set_timesteps(steps)
        ours = space_timesteps(1000, steps, spacing=spacing)
        if spacing != "trailing":
            ours = space_timesteps(1000, steps + 1, spacing=spacing)[1:]
        assert ours == dropping.timesteps.tolist()[::-1]


def test_steps_offset_moves_all():
    assert space_timesteps(1000, 4, spacing="leading", steps_offset=1) == [1, 251, 501, 751]
    assert space_timesteps(1000, 4, spacing="leading", steps_offset=249) == [249, 499, 749, 999]


def test_where_each_spacing_ends():
    assert space_timesteps(1000, 5, spacing="leading") == [0, 200, 400, 600, 800]
    assert space_timesteps(1000, 5, spacing="trailing") == [199, 399, 599, 799, 999]
    assert space_timesteps(1000, 5, spacing="linspace") == [0, 250, 500, 749, 999]  # 499.5 and 749.25
    assert space_timesteps(1000, np.int64(5)) == [0, 250, 500, 749, 999]


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.sampled_from(SPACINGS))
def test_every_spacing_gives_that_many_rising_timesteps(case, spacing):
    num_timesteps, steps = case
    kept = np.array(space_timesteps(num_timesteps, steps, spacing=spacing))
    assert len(kept) == steps
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < num_timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("bad", [0, -3, 1001, 2.5, "10", "ddim10", [5, 5], None])
def test_spacings_of_one_count_refuse_others(bad, spacing):
    with pytest.raises(ValueError, match="steps is"):
        space_timesteps(1000, bad, spacing=spacing)


def test_errors_of_spacing_and_offset():
    with pytest.raises(ValueError, match="spacing is 'even'; it may be one of 'respaced', 'leading', 'trailing', 'lin"):
        space_timesteps(1000, 5, spacing="even")
    for spacing in ("respaced", "trailing", "linspace"):
        with pytest.raises(ValueError, match="steps_offset is 1; only the spacing 'leading' takes one"):
            space_timesteps(1000, 5, spacing=spacing, steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset is 200; 5 steps of 1000 allow 0 to 199"):
        space_timesteps(1000, 5, spacing="leading", steps_offset=200)
    with pytest.raises(ValueError, match="steps_offset is -1"):
        space_timesteps(1000, 5, spacing="leading", steps_offset=-1)
    with pytest.raises(ValueError, match=r"steps_offset is 0\.5; it must be a whole"):
        space_timesteps(1000, 5, spacing="leading", steps_offset=0.5)
