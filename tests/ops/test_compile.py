"""torch.compile(fullgraph=True): the same bits, and no second compilation when a tensor's value changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, group_norm, philox_normal, q_sample, solver_step
from diffkern.process.gaussian import ProcessTables
from tests.ops import programs
from tests.ops.cases import assert_as_good_as_eager, in_layout, randn, same_bits
from tests.ops.test_q_sample import SIGMA, SIGNAL

SHAPE = (2, 4, 6, 5)
T = torch.tensor([3, 700])
TABLES = ProcessTables(SIGNAL, SIGMA)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@contextmanager
def no_recompilation() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def check_gradients(function: Callable, *leaves: torch.Tensor) -> None:
    """Outputs bit for bit; gradients to rounding, since AOT may order sums otherwise."""
    fast = compiled(function)
    y, expected = fast(*leaves), function(*leaves)
    assert same_bits(y.detach(), expected.detach())
    assert y.stride() == expected.stride()
    dy = randn(*y.shape, seed=9).to(y.dtype)
    for found, exact in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert_as_good_as_eager(found, exact.double(), exact, "gradient")


def leaf(*shape: int, seed: int = 0, layout: str = "contiguous") -> torch.Tensor:
    return in_layout(randn(*shape, seed=seed), layout).requires_grad_()


def test_loss_and_gradient_of_the_one_pass_are_constants(backend):
    fast = compiled(lambda output: diffusion_loss_and_grad(output, output, T, TABLES, scale=0.5, seed=5))
    assert not any(result.requires_grad for result in fast(leaf(*SHAPE)))


@pytest.mark.parametrize("name", ["clipped", "threshold", "learned_range"])
def test_solver_step(backend, name):
    program = programs.ALL[name]
    channels = 8 if name == "learned_range" else 4

    def function(x, output):
        noisy = solver_step(x, output, program, 1, guidance_scale=2.0, guidance_rescale=0.5, extra=x, seed=5)
        return sum(noisy) if isinstance(noisy, tuple) else noisy

    check_gradients(function, leaf(*SHAPE, layout="channels_last"), leaf(4, channels, 6, 5, seed=1))


def test_slots_and_out_are_written(backend):
    x, output, noise = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    slots, out = randn(3, *SHAPE, seed=3), torch.empty(SHAPE)

    def function(slots, out):
        return solver_step(x, output, programs.MULTISTEP, 0, slots=slots, noise=noise, out=out)[1]

    eager_slots, eager_out = slots.clone(), out.clone()
    expected = function(eager_slots, eager_out)
    with torch.no_grad():
        found = compiled(function)(slots, out)
    for a, b in [(found, expected), (slots, eager_slots), (out, eager_out)]:
        assert same_bits(a, b)


def test_tensors_with_other_values_do_not_recompile(backend):
    """seed, draw, samples, t, row and the guidance scale: what changes from step to step."""

    def function(x, t, seed, draw, samples, row, w):
        x_t = q_sample(x, t, SIGNAL, SIGMA, seed=seed, draw=draw, samples=samples)
        z = philox_normal(SHAPE, seed, draw=draw, samples=samples, stream=5)
        z = z + diffusion_loss_and_grad(x_t, x, t, TABLES, scale=w, seed=seed, draw=draw, samples=samples)[1]
        both = torch.cat([x_t, x_t + z])
        return solver_step(x, both, programs.CLIPPED, row, guidance_scale=w, extra=z, seed=seed, samples=samples)

    fast, x = compiled(function), randn(*SHAPE)
    for step in range(3):
        scalars = [torch.tensor(v) for v in (-step, step + 2, 2**40 * step, step)]
        seed, draw, samples, row = scalars
        arguments = (x, T + step, seed, draw, samples, row, torch.tensor(1.5 + step))
        if step == 0:
            fast(*arguments)
        with no_recompilation():
            assert same_bits(fast(*arguments), function(*arguments))


def test_integers_recompile_at_most_once(backend):
    """As ints: the second value makes them symbolic, further ones are free."""

    def function(x, seed, draw, row):
        z = q_sample(x, T, SIGNAL, SIGMA, seed=seed, draw=draw)
        z = z + diffusion_loss(x, x, T, TABLES, seed=seed, draw=draw)[:, None, None, None]
        return solver_step(x, z, programs.PLAIN, row, seed=seed)

    fast, x = compiled(function), randn(*SHAPE)
    for step in range(2):
        fast(x, 10 + step, 20 + step, step)
    with no_recompilation():
        assert same_bits(fast(x, 100, 200, 2), function(x, 100, 200, 2))


def test_each_program_is_its_own(backend):
    """The tables are constants of the compiled code; another program must not get the first one's."""
    first, second = (programs.program(seed, zero=("c_e", "c_v", "s")) for seed in (21, 22))
    fast = compiled(lambda x, program: solver_step(x, x, program, 0, seed=torch.tensor(1)))
    x = randn(*SHAPE)
    for program in (first, second, first):
        assert same_bits(fast(x, program), solver_step(x, x, program, 0, seed=1))


def test_an_index_out_of_range_raises_in_compiled_code_too(backend):
    fast = compiled(lambda x, t: q_sample(x, t, SIGNAL, SIGMA, seed=1))
    with pytest.raises(ValueError, match="t must lie in"):
        fast(randn(*SHAPE), torch.tensor([3, 1000]))


@pytest.mark.slow
def test_inductor(backend):
    """The default compiler, which hands backward passes gradients in layouts of its own choice."""
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def function(x):
        return conv(group_norm(conv(x), 2, activation="silu")).square().mean()

    x = leaf(*SHAPE, layout="channels_last")
    expected = torch.autograd.grad(function(x), [x, conv.weight])
    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(x), [x, conv.weight])
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).abs().max() / e.abs().max()) < 1e-5
