"""What the eager engine hands to `solver_step`: memory for what a solver remembers, and what the network sees."""

import numpy as np
import pytest
import torch

from diffkern import backends
from diffkern.ops import philox_normal
from diffkern.ops.solver_step import places
from diffkern.process import GaussianProcess, linear_betas
from diffkern.sampling import Sampler, eager
from diffkern.solvers import build, step_program
from tests.ops.programs import MULTISTEP
from tests.sampling.networks import Unconditional

PROCESS = GaussianProcess(linear_betas(100))
formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def noise(shape, memory_format):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)


def images(program, x, network, **options):
    """The states after each row, copied."""
    arguments = {"seed": 0, "first": 0, "guidance": eager.Guidance(), "keep_states": False} | options
    return [after.clone() for _, _, _, after in eager.run(network, program, x, **arguments)]


@formats
@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 4, 6), (2, 1, 4, 6), (2, 3, 1, 1)])
@pytest.mark.parametrize("steps", [build("dpmpp_2m", PROCESS, 5), MULTISTEP], ids=["dpmpp_2m", "three slots"])
def test_the_kernel_writes_in_place(steps, shape, keep_states, memory_format, monkeypatch):
    """Slots and results lie in x's memory order, so that nothing is copied."""
    if reason := backends.unavailable("native"):
        pytest.skip(reason)
    asked = []
    writable = places._writable
    monkeypatch.setattr(places, "_writable", lambda *args: asked.append(writable(*args)) or asked[-1])
    with backends.use_backend("native"):
        images(steps, noise(shape, memory_format), lambda x, row: x.clone(), keep_states=keep_states)
    assert len(asked) == np.count_nonzero(steps.writes >= 0) + steps.num_rows * (not keep_states)
    assert all(asked)


@formats
def test_what_is_remembered_follows_the_rows(memory_format):
    """x' = x + m/2 + h0/4 + h1/8; row 0 writes x to slot 0 and m to slot 1, row 1 writes x to slot 0."""
    x = noise((2, 3, 4, 6), memory_format)
    table = step_program(
        {
            "c_x": [1, 1, 1],
            "c_m": [1 / 2, 1 / 2, 1 / 2],
            "c_h0": [0, 1 / 4, 1 / 4],
            "c_h1": [0, 1 / 8, 1 / 8],
            "g0_x": [1, 1, 0],
            "g1_m": [1, 0, 0],
        },
        [2, 1, 0],
        num_slots=2,
        writes=[[0, 1], [0, -1], [-1, -1]],
    )
    first = x + torch.tanh(x) / 2
    second = first + torch.tanh(first) / 2 + x / 4 + torch.tanh(x) / 8
    third = second + torch.tanh(second) / 2 + first / 4 + torch.tanh(x) / 8
    states = images(table, x, lambda x, row: torch.tanh(x))
    for state, expected in zip(states, [first, second, third], strict=True):
        torch.testing.assert_close(state, expected)


def test_slots_that_nobody_has_written_are_not_read():
    """torch.empty gives NaN here."""
    sampler = Sampler(Unconditional(), PROCESS, (3, 4, 6), solver="dpmpp_2m", steps=5)
    expected = sampler.sample(3, batch_size=2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty_strided((1,), (1,)).isnan()
        assert torch.equal(sampler.sample(3, batch_size=2), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@formats
def test_the_network_sees_the_scaled_state(memory_format):
    x = noise((2, 3, 4, 6), memory_format)
    scale = np.array([0.5, 0.25, 1.0])
    table = step_program({"c_x": np.ones(3), "c_m": np.full(3, 0.1), "s": scale}, np.arange(3))
    seen = []
    states = images(table, x, lambda x_in, row: seen.append(x_in.clone()) or torch.tanh(x_in))
    for row, x_in in enumerate(seen):
        torch.testing.assert_close(x_in, states[row - 1] * scale[row - 1] if row else x)
        torch.testing.assert_close(states[row], (states[row - 1] if row else x) + 0.1 * torch.tanh(x_in))


@formats
@pytest.mark.parametrize("variance", ["fixed", "learned"])
@pytest.mark.parametrize("doubled", [False, True])
def test_rows_that_call_no_network(doubled, variance, memory_format):
    """Noise before the first step and in between, on every number of samples and channels that an output has."""
    x = noise((2, 3, 4, 6), memory_format)
    calls = [False, True, False, True]
    table = step_program(
        {"c_x": [1, 1, 0.5, 1], "c_m": [0, 0.1, 0, 0.1], "c_z": [2, 0, 1, 0]},
        [9, 8, 7, 6],
        calls_network=calls,
        variance=variance,
    )
    rows = []

    def network(x, row):
        rows.append(row)
        m = torch.tanh(x) if variance == "fixed" else torch.cat([torch.tanh(x), torch.zeros_like(x)], dim=1)
        return torch.cat([torch.full_like(m, 7.0), m]) if doubled else m

    guidance = eager.Guidance(scale=1.0 if doubled else None)
    shown = list(eager.run(network, table, x, 3, 5, guidance, keep_states=True))
    assert rows == [1, 3]
    assert [output is not None for _, _, output, _ in shown] == calls
    first = x + 2 * philox_normal(x.shape, 3, draw=0, samples=5, stream=2)
    second = first + 0.1 * torch.tanh(first)
    third = second / 2 + philox_normal(x.shape, 3, draw=2, samples=5, stream=2)
    fourth = third + 0.1 * torch.tanh(third)
    for (_, before, _, after), expected in zip(shown, [first, second, third, fourth], strict=True):
        torch.testing.assert_close(after, expected)
        assert after.data_ptr() != before.data_ptr()


def test_the_gradient_is_asked_for_at_the_state_of_the_rows_that_call_the_network():
    x = noise((2, 3, 4, 6), torch.contiguous_format)
    table = step_program({"c_x": [2, 1, 1], "c_e": [0, 0.5, 0.25]}, [9, 8, 7], calls_network=[False, True, True])
    seen = []
    guidance = eager.Guidance(gradient=lambda x, row: seen.append(row) or torch.sin(x))
    states = images(table, x, lambda x, row: torch.zeros_like(x), guidance=guidance)
    assert seen == [1, 2]
    second = 2 * x + 0.5 * torch.sin(2 * x)
    torch.testing.assert_close(states[1], second)
    torch.testing.assert_close(states[2], second + 0.25 * torch.sin(second))
