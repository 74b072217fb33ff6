"""Gradients of x, the model's output and extra, through every feature of a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.ops import philox_normal, solver_step
from tests.ops import programs
from tests.ops.cases import STORAGE, assert_as_good_as_eager, randn, same_bits
from tests.ops.solver_calls import Call, make


def leaves_of(call: Call) -> list[Tensor]:
    call.x, call.model_output = call.x.detach().requires_grad_(), call.model_output.detach().requires_grad_()
    if call.extra is not None:
        call.extra = call.extra.detach().requires_grad_()
    return [t for t in (call.x, call.model_output, call.extra) if t is not None]


def value(results: tuple[Tensor, ...] | Tensor, weights: list[Tensor]) -> Tensor:
    """One number of x' and, where there is one, s·x'."""
    results = results if isinstance(results, tuple) else (results,)
    return sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=False))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", programs.ALL)
def test_every_program(backend, name, layout, dtype):
    """Beside eager autograd. 16-bit states round the point at which a clamp decides, so they get no threshold."""
    if name == "threshold" and dtype != torch.float32:
        return
    for guidance, rescale in [(None, None), (2.5, None), ([0.5, 3.0, -1.0], 0.6)]:
        call = make(
            programs.ALL[name], (3, 4, 5, 7), [2, 0, 1], layout=layout, dtype=dtype, guidance=guidance, rescale=rescale
        )
        leaves = leaves_of(call)
        weights = [randn(3, 4, 5, 7, seed=20 + i).to(dtype) for i in range(2)]
        found = torch.autograd.grad(
            value(call.run(slots=None if call.slots is None else call.slots.clone()), weights), leaves
        )
        scaled = slice(0, 2 if call.program.scales_input else 1)
        exact = torch.autograd.grad(value(call.oracle()[scaled], weights), leaves)
        eager = torch.autograd.grad(value(call.oracle(dtype)[scaled], weights), leaves)
        for leaf, f, e, other in zip(leaves, found, exact, eager, strict=True):
            assert f.dtype == leaf.dtype
            assert_as_good_as_eager(f, e, other, (name, guidance, rescale))


@pytest.mark.parametrize("name", programs.ALL)
def test_noise_from_a_counter_is_made_again(backend, name):
    call = make(programs.ALL[name], (2, 3, 4, 5), [2, 0], guidance=1.5)
    leaves = leaves_of(call)
    noise = torch.cat([philox_normal((1, 3, 4, 5), 6, draw=r, samples=n, stream=2) for n, r in enumerate([2, 0])])
    slots = [None if call.slots is None else call.slots.clone() for _ in range(2)]
    counted = torch.autograd.grad(value(call.run(seed=6, slots=slots[0]), [noise, noise]), leaves)
    given = torch.autograd.grad(value(call.run(noise=noise, slots=slots[1]), [noise, noise]), leaves)
    for a, b in zip(counted, given, strict=True):
        assert_as_good_as_eager(a, b.double(), b, name)


@pytest.mark.parametrize("name", programs.ALL)
@pytest.mark.parametrize("rescale", [None, 0.7])
def test_gradcheck(backend, name, rescale):
    for shape in [(2, 3), (2, 2, 3), (2, 1, 2, 2)]:
        call = make(programs.ALL[name], shape, [1, 0], dtype=torch.float64, guidance=2.0, rescale=rescale)
        leaves = leaves_of(call)

        def step(x, output, extra=None, call=call):
            call.x, call.model_output, call.extra = x, output, extra
            return call.run(slots=None if call.slots is None else call.slots.clone())

        assert torch.autograd.gradcheck(step, leaves, eps=1e-6, atol=1e-5)


def test_rank_one(backend):
    x = randn(4, dtype=torch.float64).requires_grad_()
    output = randn(8, seed=1, dtype=torch.float64).requires_grad_()
    program = programs.program(9, zero=("c_e", "c_v", "c_z", "s"), threshold=(0.5, 1.5))
    assert torch.autograd.gradcheck(lambda x, m: solver_step(x, m, program, 0, guidance_scale=2.0), (x, output))


def test_only_what_is_wanted(backend):
    """One leaf at a time gives the same gradient as all of them together."""
    call = make(programs.CLIPPED, (2, 3, 4, 5), 1, guidance=1.5)
    leaves = leaves_of(call)
    together = torch.autograd.grad(call.run().square().sum(), leaves)
    for number, name in enumerate(("x", "model_output", "extra")):
        alone = make(programs.CLIPPED, (2, 3, 4, 5), 1, guidance=1.5)
        leaf = getattr(alone, name).requires_grad_()
        assert same_bits(torch.autograd.grad(alone.run().square().sum(), leaf)[0], together[number])


def test_a_zero_coefficient_gives_a_zero_gradient(backend):
    """Also where the operand is NaN."""
    program = programs.program(14, zero=programs.keep(("c_m",)))
    call = make(program, (2, 3, 4, 5), 1)
    call.x.fill_(torch.nan)
    x, output, *_ = leaves_of(call)
    dx, dm = torch.autograd.grad(call.run().sum(), [x, output])
    assert bool((dx == 0).all())
    assert bool(dm.isfinite().all())


def test_nan_stays_in_its_sample(backend):
    call = make(programs.CLIPPED, (3, 3, 4, 5), 1, guidance=1.5)
    leaves = leaves_of(call)
    dy = randn(3, 3, 4, 5, seed=9)
    before = torch.autograd.grad(call.run(), leaves, dy)
    dy[1, 0, 0, 0] = torch.nan
    after = torch.autograd.grad(call.run(), leaves, dy)
    for a, b in zip(after, before, strict=True):
        others = [n for n in range(a.shape[0]) if n % 3 != 1]
        assert same_bits(a[others], b[others])


def test_out_is_refused_where_a_gradient_is_wanted(backend):
    call = make(programs.PLAIN, (2, 3, 4, 5), 1)
    leaves_of(call)
    out = torch.full((2, 3, 4, 5), 7.0)
    with pytest.raises(ValueError, match="out cannot be used where a gradient is wanted"):
        call.run(out=out)
    assert bool((out == 7.0).all())
    with torch.no_grad():
        assert call.run(out=out) is out
