"""One row of a program: values against the equations, for every dtype, layout and feature of the table."""

from __future__ import annotations

import pytest
import torch

from diffkern.ops import philox_normal, solver_step
from tests.ops import programs
from tests.ops.cases import (
    DTYPES,
    Untouched,
    assert_as_good_as_eager,
    in_layout,
    memory_format,
    randn,
    same_bits,
)
from tests.ops.solver_calls import Call, make

SHAPES = [(3, 5), (2, 7, 13), (3, 5, 7, 7), (2, 1, 9, 9), (2, 6, 1, 1), (2, 3, 4, 5, 6), (257, 2, 3, 3), (2, 5, 61, 67)]
EMPTY = [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)]


def check(call: Call, case: object) -> None:
    """x', s·x' and the slots beside the oracle; operands untouched; repeatable."""
    slots = None if call.slots is None else call.slots.clone()
    with Untouched(*call.operands()):
        result = call.run(slots=slots)
    results = [*(result if isinstance(result, tuple) else (result,)), *([] if slots is None else [slots])]
    exact, eager = call.oracle(), call.oracle(call.x.dtype)
    if not call.program.scales_input:
        exact, eager = (exact[0], *exact[2:]), (eager[0], *eager[2:])
    for number, (actual, e, other) in enumerate(zip(results, exact, eager, strict=False)):
        assert_as_good_as_eager(actual, e, other, (case, number))
        assert actual.dtype == call.x.dtype
    assert memory_format(results[0]) == memory_format(call.x)
    again = call.run(slots=None if call.slots is None else call.slots.clone())
    assert same_bits(again[0] if isinstance(again, tuple) else again, results[0])


@pytest.mark.parametrize("name", programs.ALL)
@pytest.mark.parametrize("guided", ["unguided", "guided", "per sample", "rescaled"])
def test_every_program_and_row(backend, name, guided):
    options = {
        "unguided": {},
        "guided": {"guidance": 3.5},
        "per sample": {"guidance": [0.0, 1.0, -2.5]},
        "rescaled": {"guidance": 3.5, "rescale": 0.7},
    }[guided]
    for layout in ("contiguous", "channels_last"):
        for rows in (0, 1, 2, [2, 0, 1]):
            check(make(programs.ALL[name], (3, 4, 9, 11), rows, layout=layout, **options), (rows, layout))


@pytest.mark.parametrize("name", programs.ALL)
def test_row_as_a_tensor_is_the_row(backend, name):
    for shape in [(3, 4, 5, 6), (2, 3, 50, 70)]:
        call = make(programs.ALL[name], shape, 1)
        results = []
        for rows in (1, torch.tensor(1), torch.full((shape[0],), 1), torch.tensor([1, 0] * shape[0])[::2]):
            slots = None if call.slots is None else call.slots.clone()
            call.rows = rows
            x_next = call.run(slots=slots)
            results.append([x_next[0] if isinstance(x_next, tuple) else x_next, *([] if slots is None else [slots])])
        assert all(same_bits(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("name", programs.ALL)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_noise_from_a_counter_has_the_row_as_its_draw(backend, name, layout):
    call = make(programs.ALL[name], (3, 4, 21, 33), [2, 0, 2], layout=layout)
    noise = torch.cat(
        [philox_normal((1, 4, 21, 33), 2**63, draw=r, samples=50 + n, stream=2) for n, r in enumerate([2, 0, 2])]
    )
    slots = [None if call.slots is None else call.slots.clone() for _ in range(2)]
    computed = call.run(seed=2**63, samples=50, slots=slots[0])
    given = call.run(noise=noise, slots=slots[1])
    pairs = zip(computed, given, strict=True) if isinstance(given, tuple) else [(computed, given)]
    for a, b in pairs:
        if backend == "native":
            assert same_bits(a, b)
        else:
            assert_as_good_as_eager(a, b.double(), b, name)


def test_counter_options(backend):
    call = make(programs.PLAIN, (3, 4, 5, 6), 2)
    expected = call.run(noise=philox_normal((3, 4, 5, 6), 7, draw=2, samples=9, stream=6))
    assert same_bits(call.run(seed=7, samples=9, stream=6), expected)
    assert same_bits(call.run(seed=torch.tensor(7), samples=torch.tensor([9, 10, 11]), stream=6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_generator_draws_what_randn_like_draws(backend, layout, dtype):
    call = make(programs.PLAIN, (2, 6, 7, 9), layout=layout, dtype=dtype)
    x_next = call.run(generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    assert same_bits(x_next, call.run(noise=torch.randn_like(call.x)))


def test_batches_may_be_split_anywhere(backend):
    call = make(programs.CLIPPED, (5, 3, 20, 30), 1, guidance=2.0)
    whole = call.run(seed=3, samples=10)
    uncond, cond = call.model_output.chunk(2)
    for layout in ("contiguous", "channels_last"):
        parts = []
        for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
            output = in_layout(torch.cat([uncond[part], cond[part]]), layout)
            x, extra = in_layout(call.x[part], layout), call.extra[part]
            parts.append(
                solver_step(
                    x, output, call.program, 1, guidance_scale=2.0, extra=extra, seed=3, samples=10 + part.start
                )
            )
        assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operand", ["x", "model_output", "noise", "extra"])
@pytest.mark.parametrize("name", ["plain", "threshold", "learned_range"])
def test_nan_and_inf_stay_in_their_sample(backend, name, operand, bad):
    """Elementwise they stay where they are; a threshold is taken over the sample, and no further."""
    for layout in ("contiguous", "channels_last"):
        call = make(programs.ALL[name], (3, 4, 6, 6), layout=layout, rescale=0.5, guidance=2.0)
        spoilt = getattr(call, operand)
        if spoilt is None:
            return
        first = call.run()
        before = first[0] if isinstance(first, tuple) else first
        spoilt[1, 0, 0, 0] = bad
        second = call.run()
        after = second[0] if isinstance(second, tuple) else second
        assert not bool(after[1].isfinite().all())
        assert same_bits(after[[0, 2]], before[[0, 2]])


def test_rank_one_and_single_values(backend):
    """No channel axis, one value a sample: rescaling has no deviation to go by and does nothing."""
    for shape in [(4,), (4, 1), (1, 1, 1, 1)]:
        x, output = randn(*shape), randn(2 * shape[0], *shape[1:], seed=1)
        program = programs.program(9, zero=("c_e", "c_v", "c_z", "s"))
        m = output[: shape[0]] + 2.0 * (output[shape[0] :] - output[: shape[0]])
        expected = program.column("c_x")[0] * x + program.column("c_m")[0] * m
        found = solver_step(x, output, program, 0, guidance_scale=2.0, guidance_rescale=0.5)
        assert_as_good_as_eager(found, expected.double(), expected, shape)
        limited = programs.program(9, zero=programs.keep(("a_x", "c_0")), threshold=(0.5, 100.0))
        x0 = limited.column("a_x")[0] * x
        expected = limited.column("c_0")[0] * x0 / x0.abs().clamp_min(1.0)
        found = solver_step(x, output[: shape[0]], limited, 0)
        assert_as_good_as_eager(found, expected.double(), expected, shape)


@pytest.mark.parametrize("limits", [{"clip": (-1.0, 1.0)}, {"threshold": (0.5, 1.5)}])
def test_a_clamp_does_not_hide_a_nan(backend, limits):
    """Where x' is made of the clamped x0 alone; an infinite x0 is clamped like a large one."""
    program = programs.program(18, zero=programs.keep(("a_x", "c_0")), **limits)
    x = randn(3, 2, 5, 7)
    x[1, 0, 0, 0], x[2, 1, 1, 1] = torch.nan, torch.inf
    found = solver_step(x, x, program, 0)
    assert bool(found[1, 0, 0, 0].isnan())
    large = solver_step(x.nan_to_num(posinf=1e30), x, program, 0)
    assert same_bits(found[2, 1, 1, 1], large[2, 1, 1, 1])
    assert same_bits(found[0], large[0])
