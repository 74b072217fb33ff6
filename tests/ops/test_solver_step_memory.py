"""What a step writes and what it does not read: out, slots, and operands whose coefficients are zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkern.ops import solver_step
from tests.ops import programs
from tests.ops.cases import Untouched, assert_as_good_as_eager, in_layout, randn, same_bits
from tests.ops.solver_calls import make

STATE = programs.program(11, zero=("c_e", "c_v", "s"))
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@layouts
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 5, 61, 67), (3, 7)])
def test_out_is_where_the_result_goes(backend, layout, shape):
    call = make(STATE, shape, 1, layout=layout)
    expected = call.run()
    for out_layout in ("contiguous", "channels_last", "sliced", "offset"):
        out = in_layout(torch.full(shape, torch.nan), out_layout)
        with Untouched(*call.operands()):
            assert call.run(out=out) is out
        assert same_bits(out, expected)


@layouts
@pytest.mark.parametrize("operand", ["x", "model_output", "noise"])
def test_out_may_be_an_operand(backend, layout, operand):
    """In place: x itself, or a buffer that is no longer needed. Autograd is told that it changed."""
    call = make(STATE, (2, 5, 41, 43), 1, layout=layout)
    expected = call.run()
    out = getattr(call, operand)
    version = out._version
    assert call.run(out=out) is out
    assert same_bits(out, expected)
    assert out._version > version


@layouts
def test_what_the_network_sees_next_is_of_the_unrounded_state(backend, layout):
    """x_in = s·x' from the arithmetic's x', not from the stored one; x itself may be overwritten."""
    program = programs.program(10, zero=("c_e", "c_v"))
    call = make(program, (2, 3, 9, 11), 2, layout=layout, dtype=torch.bfloat16)
    exact = call.oracle()
    x_next, x_in = call.run(out=call.x)
    assert x_next is call.x
    assert_as_good_as_eager(x_in, exact[1], exact[1].bfloat16(), "x_in")


def test_out_half_way_over_an_operand(backend):
    """Views that overlap without being the same: the result is right all the same."""
    x, output, noise = randn(3, 40, 41), randn(3, 40, 41, seed=1), randn(3, 40, 41, seed=2)
    expected = solver_step(x, output, STATE, 0, noise=noise)
    around = torch.zeros(5, 40, 41)
    around[1:4] = x
    for out in (around[:3], around[2:]):
        around[1:4] = x
        assert same_bits(solver_step(around[1:4], output, STATE, 0, noise=noise, out=out), expected)


def test_out_over_an_operand_of_another_dtype(backend):
    """The same address and strides, and yet other elements."""
    x, buffer = randn(3, 40, 41), torch.empty(3, 40, 41)
    output = buffer.view(-1).view(torch.bfloat16)[: x.numel()].view(x.shape).copy_(randn(3, 40, 41, seed=1))
    noise = randn(3, 40, 41, seed=2)
    expected = solver_step(x, output, STATE, 0, noise=noise)
    assert same_bits(solver_step(x, output, STATE, 0, noise=noise, out=buffer), expected)


@layouts
def test_out_over_one_half_of_a_guided_output(backend, layout):
    for variance in ("fixed", "learned"):
        program = programs.program(12, zero=("c_e", "c_v", "s"), variance=variance)
        call = make(program, (2, 4, 9, 11), 1, layout=layout, guidance=2.0)
        expected = call.run()
        storage = call.model_output
        for out in (storage[:2, :4], storage[2:, -4:]):
            kept = storage.clone()
            assert same_bits(call.run(out=out), expected)
            storage.copy_(kept)


def test_out_is_seen_by_autograd(backend):
    """A tensor that a backward pass still needs may not change under it unnoticed."""
    x, w = randn(2, 3, 4, 4), randn(2, 3, 4, 4).requires_grad_()
    loss = (x * w).sum()
    with torch.no_grad():
        solver_step(x, randn(2, 3, 4, 4), STATE, 0, noise=randn(2, 3, 4, 4), out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@layouts
@pytest.mark.parametrize("slots_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_written_where_the_row_says(backend, layout, slots_layout, dtype):
    call = make(programs.MULTISTEP, (3, 4, 7, 9), layout=layout, dtype=dtype)
    initial = call.slots
    for rows in (0, 1, 2, [0, 1, 2]):
        call.rows, call.slots = rows, initial
        exact, eager = call.oracle()[2], call.oracle(dtype)[2]
        slots = {
            "contiguous": initial.clone(),
            "channels_last": initial.movedim(2, -1).contiguous().movedim(-1, 2),
            "sliced": torch.full((6, *initial.shape[1:]), torch.nan, dtype=dtype)[::2].copy_(initial),
        }[slots_layout]
        version = slots._version
        x_next, _ = call.run(slots=slots)
        assert_as_good_as_eager(slots, exact, eager, rows)
        assert slots._version > version
        per_sample = rows if isinstance(rows, list) else [rows] * 3
        for n, row in enumerate(per_sample):
            for k in set(range(3)) - set(programs.WRITES[row]):
                assert same_bits(slots[k, n], initial[k, n])
        assert_as_good_as_eager(x_next, call.oracle()[0], call.oracle(dtype)[0], rows)


def test_slots_of_a_differentiated_step_are_written_too(backend):
    call = make(programs.MULTISTEP, (2, 3, 4, 5), 0)
    without = call.slots.clone()
    call.run(slots=without)
    slots = call.slots.clone()
    call.x = call.x.requires_grad_()
    assert call.run(slots=slots)[0].requires_grad
    assert same_bits(slots, without)


def test_two_slots_may_change_places(backend):
    """Both writes read the values from before the step."""
    names = ("c_x", "g0_h1", "g1_h0")
    swap = programs.program(
        13, num_slots=2, writes=np.tile([0, 1], (programs.ROWS, 1)), zero=programs.keep(names, num_slots=2)
    )
    call = make(swap, (2, 3, 50, 40), 0)
    before = call.slots.clone()
    call.run()
    assert same_bits(call.slots[0], swap.column("g0_h1")[0].astype(np.float32) * before[1])
    assert same_bits(call.slots[1], swap.column("g1_h0")[0].astype(np.float32) * before[0])


@layouts
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize(
    ("read", "poisoned"),
    [
        (("c_x",), ("model_output", "noise", "extra", "slots")),
        (("c_m",), ("x", "noise", "extra", "slots")),
        (("a_x", "c_0"), ("model_output", "noise", "extra", "slots")),
        (("a_m", "c_0"), ("x", "noise", "extra", "slots")),
        (("c_z",), ("x", "model_output", "extra", "slots")),
        (("c_e",), ("x", "model_output", "noise", "slots")),
        (("c_h0", "c_h1"), ("x", "model_output", "noise", "extra")),
        ((), ("x", "model_output", "noise", "extra", "slots")),
    ],
)
def test_a_zero_coefficient_is_not_read(backend, layout, read, poisoned, clip, per_sample):
    program = programs.program(14, num_slots=2, zero=programs.keep(read, 2), clip=clip)
    call = make(program, (2, 3, 5, 7), [1, 0] if per_sample else 1, layout=layout)
    call.extra = in_layout(randn(2, 3, 5, 7), layout)
    clean = call.run(slots=call.slots.clone())
    for name in poisoned:
        getattr(call, name).fill_(torch.nan)
    assert same_bits(call.run(), clean)
    assert bool(clean.isfinite().all())


def test_a_learned_variance_is_not_read_without_noise(backend):
    program = programs.program(15, zero=("c_z", "c_e", "c_v", "s"), variance="learned_range")
    call = make(program, (2, 3, 5, 7), 1, guidance=2.0)
    clean = call.run()
    call.model_output[:, 3:] = torch.nan
    assert same_bits(call.run(), clean)


def test_the_variance_comes_from_the_conditional_half(backend):
    call = make(programs.LEARNED, (2, 3, 5, 7), 1, guidance=2.0)
    clean = call.run()
    call.model_output[:2, 3:] = torch.nan
    assert same_bits(call.run(), clean)


def test_a_threshold_does_not_read_what_x0_does_not(backend):
    """A network that predicts x0 (a_x = 0) after a state that went astray."""
    program = programs.program(16, zero=programs.keep(("a_m", "c_0")), threshold=(0.9, 3.0))
    call = make(program, (2, 3, 5, 7), 0)
    clean = call.run()
    call.x.fill_(torch.nan)
    assert same_bits(call.run(), clean)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_many_slots_as_the_kernels_hold(backend, layout, dtype):
    """Each is read, and two a row are written, in every sample others."""
    program = programs.program(19, num_slots=8, writes=np.array([[0, 7], [7, -1], [-1, 3]]), clip=(-1.0, 1.0))
    call = make(program, (3, 2, 5, 7), [0, 1, 2], layout=layout, dtype=dtype)
    (next_, _, new_slots), eager = call.oracle(), call.oracle(dtype)
    slots = call.slots.clone()
    x_next, _ = call.run(slots=slots)
    assert_as_good_as_eager(x_next, next_, eager[0], "x'")
    assert_as_good_as_eager(slots, new_slots, eager[2], "slots")


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("bad", [-1, programs.ROWS, 2**62, -(2**63)])
def test_a_row_that_is_not_there_gives_nan_on_a_device(backend, bad, monkeypatch):
    """In its sample alone: x', what the network sees next, and the threshold."""
    from diffkern.ops.dynamic_threshold import triton as threshold
    from diffkern.ops.solver_step import triton as step

    for kernels in (threshold, step):
        monkeypatch.setattr(kernels, "check_values", lambda *_: None)
    limited = programs.program(3, zero=("c_e", "c_v"), threshold=(0.9, 2.0))
    for program in (programs.program(10, zero=("c_e", "c_v")), limited):
        call = make(program, (3, 2, 5, 7), [1, 2, 0], guidance=2.0)
        clean = call.run(seed=1)
        call.rows = [1, bad, 0]
        for found, expected in zip(call.run(seed=1), clean, strict=True):
            assert bool(found[1].isnan().all())
            assert same_bits(found[[0, 2]], expected[[0, 2]])


def test_more_slots_than_the_kernel_holds_fall_back():
    program = programs.program(17, num_slots=9, zero=("c_e", "c_v", "s"))
    call = make(program, (2, 3, 4, 4), 0)
    assert_as_good_as_eager(call.run(), call.oracle()[0], call.oracle(torch.float32)[0], "nine slots")


def with_history(shape, layout):
    """A call of a program with three slots whose row writes the second; slots of other layouts than x's among them."""
    program = programs.program(12, num_slots=3, writes=[(1, -1)] * 3, zero=("c_e", "c_v", "s"))
    call = make(program, shape, 1, layout=layout)
    others = ("contiguous", "channels_last", "sliced")
    return call, [in_layout(h.clone(), other) for h, other in zip(call.slots, others, strict=True)]


@layouts
def test_slots_may_be_tensors_of_their_own(backend, layout):
    """The numbers of one buffer; only the slot that the row writes changes, in place whatever its layout is."""
    call, listed = with_history((2, 5, 41, 43), layout)
    before, versions = [h.clone() for h in listed], [h._version for h in listed]
    buffer = call.slots.clone()
    expected = call.run(slots=buffer)
    assert same_bits(call.run(slots=listed), expected)
    assert same_bits(listed[1], buffer[1])
    assert listed[1]._version > versions[1]
    for k in (0, 2):
        assert same_bits(listed[k], before[k])
        assert listed[k]._version == versions[k]


def test_listed_slots_where_a_gradient_is_wanted(backend):
    call, listed = with_history((2, 5, 7, 9), "contiguous")
    buffer = call.slots.clone()
    expected = call.run(slots=buffer)
    call.x = call.x.clone().requires_grad_()
    result = call.run(slots=listed)
    assert result.requires_grad
    assert same_bits(result.detach(), expected)
    assert same_bits(listed[1], buffer[1])
    assert not listed[1].requires_grad


def test_listed_slots_must_be_as_many_as_the_program_has(backend):
    call, listed = with_history((2, 5, 7, 9), "contiguous")
    with pytest.raises(ValueError, match=r"slots must be 3 tensors for this program, got 2"):
        call.run(slots=listed[:2])
    with pytest.raises(ValueError, match=r"slots\[2\] must"):
        call.run(slots=[*listed[:2], listed[2][:1]])
    with pytest.raises(TypeError, match="slots must have x's dtype"):
        call.run(slots=[*listed[:2], listed[2].double()])


@pytest.mark.parametrize("rows", [1, [1, 0]], ids=["one row", "a row each"])
def test_listed_slots_in_compiled_code(rows):
    """What is written reaches a tensor that the compiled code makes and returns."""
    call, _ = with_history((2, 5, 7, 9), "contiguous")
    row = torch.tensor(rows) if isinstance(rows, list) else rows

    def step(x, output, noise, slots):
        written = torch.zeros_like(x)
        history = [slots[0], written, slots[2]]
        return solver_step(x, output, call.program, row, slots=history, noise=noise), written

    arguments = (call.x, call.model_output, call.noise, call.slots)
    with torch.no_grad():
        expected, compiled = step(*arguments), torch.compile(step, fullgraph=True)(*arguments)
    assert expected[1].any()
    for mine, theirs in zip(compiled, expected, strict=True):
        assert same_bits(mine, theirs)
