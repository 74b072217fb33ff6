import copy
import pickle

import numpy as np
import pytest

from diffkern.solvers import columns, step_program
from tests.solvers.executor import execute


def test_columns_stand_in_the_order_that_the_kernels_read():
    assert " ".join(columns(0)) == (
        "a_x a_m c_x c_m c_0 c_z c_e c_v s log_var_min log_var_max g0_x g0_m g0_0 g1_x g1_m g1_0"
    )
    assert " ".join(columns(2)) == (
        "a_x a_m c_x c_m c_0 c_z c_e c_v s log_var_min log_var_max c_h0 c_h1 "
        "g0_x g0_m g0_0 g0_h0 g0_h1 g1_x g1_m g1_0 g1_h0 g1_h1"
    )
    assert [len(columns(slots)) for slots in range(6)] == [17 + 3 * slots for slots in range(6)]


def test_defaults():
    program = step_program({"c_x": [1, 2], "c_z": [0, 3]}, [999, 0])
    assert program.coefficients.shape == (2, 17)
    assert program.column("c_x").tolist() == [1, 2]
    assert program.column("c_z").tolist() == [0, 3]
    assert program.column("s").tolist() == [1, 1]
    assert program.coefficients.sum() == 1 + 2 + 3 + 2
    assert (program.num_rows, program.scales_input, program.variance) == (2, False, "fixed")
    assert program.times.tolist() == [999, 0]
    assert program.calls_network.tolist() == [True, True]
    assert program.writes.tolist() == [[-1, -1], [-1, -1]]
    assert program.makes_noise
    assert step_program({"s": [1, 0.5]}, [1, 0]).scales_input
    assert not step_program({"s": [1, 0.5]}, [1, 0]).makes_noise


def test_arrays_are_read_only_copies():
    times, writes = np.array([1.0, 0.0]), np.array([[0, -1], [-1, 0]])
    program = step_program({}, times, writes=writes, num_slots=1)
    times[:], writes[:] = 5, 5
    assert program.times.tolist() == [1, 0]
    for array in (program.coefficients, program.times, program.calls_network, program.writes, program.column("s")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_programs_are_told_apart_by_identity():
    one, two = (step_program({"c_x": [1]}, [0]) for _ in range(2))
    assert one != two
    assert len({one, two}) == 2


def named():
    return {
        "a_x": [2.0, 1e20],
        "a_m": [-3.0, -1e20],
        "c_x": [0.5, 0.0],
        "c_m": [0.25, 0.0],
        "c_0": [0.1, 1e-20],
        "g0_0": [1.0, 0.0],
        "g1_x": [0.0, 1.0],
        "g1_0": [0.0, 0.5],
    }


def test_x0_is_folded_in_float64_where_nothing_clips():
    program = step_program(named(), [1, 0], num_slots=2, writes=[[0, -1], [-1, 1]])
    expected = {
        "c_x": [0.5 + 0.1 * 2, 1],
        "c_m": [0.25 - 0.1 * 3, -1],
        "c_0": [0, 0],
        "g0_x": [2, 0],
        "g0_m": [-3, 0],
        "g0_0": [0, 0],
        "g1_x": [0, 1 + 0.5e20],
        "g1_m": [0, -0.5e20],
        "g1_0": [0, 0],
        "a_x": named()["a_x"],
        "a_m": named()["a_m"],
    }
    for name, column in expected.items():
        np.testing.assert_allclose(program.column(name), column, rtol=1e-15, err_msg=name)


@pytest.mark.parametrize("limits", [{"clip": (-1, 1)}, {"threshold": (0.995, 1.5)}])
def test_x0_is_not_folded_where_it_is_clipped(limits):
    program = step_program(named(), [1, 0], num_slots=2, **limits)
    for name, column in named().items():
        assert program.column(name).tolist() == column


def test_x0_program():
    program = step_program(named(), [1, 0], num_slots=2, clip=(-1, 1), variance="learned_range").x0_program()
    assert (program.clip, program.variance, program.num_slots) == ((-1, 1), "learned_range", 0)
    assert program.column("c_0").tolist() == [1, 1]
    assert program.column("c_x").tolist() == [0, 0]
    unclipped = step_program(named(), [1, 0], num_slots=2).x0_program()
    assert unclipped.column("c_x").tolist() == named()["a_x"]
    assert unclipped.column("c_m").tolist() == named()["a_m"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"named": {"c_h0": [0, 0]}}, "column 'c_h0' does not exist with 0 slots"),
        ({"named": {"c_x": [0]}}, r"column 'c_x' has shape \(1,\); it must be \(2,\)"),
        ({"named": {"c_x": [0, np.nan]}}, r"coefficients\[1\], column c_x, is nan"),
        ({"named": {"a_m": [-np.inf, 0]}, "clip": (-1, 1)}, r"coefficients\[0\], column a_m, is -inf"),
        ({"named": {"c_z": [0, 1e39]}}, "column c_z.*finite in float32"),
        ({"times": [0, np.inf]}, "times must be finite"),
        ({"times": []}, "no rows"),
        ({"times": [[1, 0]], "named": {}}, "times is float64 of shape"),
        ({"writes": [[0, -1], [-1, -1]]}, "writes must be slots below 0"),
        ({"writes": [[0, 0], [-1, -1]], "num_slots": 1}, "writes one slot twice"),
        ({"writes": [0, 1]}, "writes is int64 of shape"),
        ({"calls_network": [True]}, "calls_network is bool of shape"),
        ({"variance": "small"}, "variance is 'small'; it may be one of 'fixed', 'learned', 'learned_range'"),
        ({"clip": (1, -1)}, "clip is"),
        ({"clip": (float("nan"), 1)}, "clip is"),
        ({"threshold": (0, 1)}, "threshold is"),
    ],
)
def test_errors_name_the_field(kwargs, message):
    arguments = {"named": {}, "times": [1, 0], **kwargs}
    with pytest.raises(ValueError, match=message):
        step_program(**arguments)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda program: pickle.loads(pickle.dumps(program))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_as_read_only_as_the_program(clone):
    program = step_program({"c_x": [1, 2], "c_z": [0, 3]}, [999, 0])
    twin = clone(program)
    assert twin.makes_noise
    assert np.array_equal(twin.coefficients, program.coefficients)
    for array in (twin.coefficients, twin.times, twin.calls_network, twin.writes):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("writes", [[-1, -1], [0, -1], [-1, 1]])
def test_with_x0_remembers_what_each_row_saw_and_changes_nothing_else(writes, clip):
    rng = np.random.default_rng(0)
    x, output = rng.standard_normal((2, 3, 1, 4, 5))
    named = {name: rng.uniform(0.5, 1.0, 1) for name in columns(2) if not name.startswith("log_var")} | {"s": [1.0]}
    program = step_program(named, [7], num_slots=2, writes=[writes], clip=clip)
    shown = program.with_x0()
    slots, more = rng.standard_normal((2, *x.shape)), np.full((3, *x.shape), np.nan)
    more[:2] = slots
    expected, step = execute(program, 0, x, output, slots=slots), execute(shown, 0, x, output, slots=more)
    np.testing.assert_array_equal(step.x, expected.x)
    np.testing.assert_array_equal(more[:2], slots)
    np.testing.assert_allclose(more[2], expected.x0, rtol=1e-15, atol=1e-15)
    assert (shown.num_slots, shown.clip, shown.times.tolist()) == (3, clip, [7])


def test_with_x0_needs_a_free_write():
    with pytest.raises(ValueError, match="a row writes two slots already"):
        step_program({"c_x": [1]}, [0], num_slots=2, writes=[[0, 1]]).with_x0()
