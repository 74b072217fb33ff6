import numpy as np
import pytest
import torch

from diffkern.process import FlowProcess
from diffkern.solvers import transitions


def test_levels_and_what_the_network_is_given():
    process = FlowProcess(10)
    np.testing.assert_allclose(process.sigmas, np.arange(1, 11) / 10, rtol=1e-15)
    np.testing.assert_allclose(process.timestep_map, np.arange(1, 11), rtol=1e-15)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_shift_multiplies_the_noise_to_signal_ratio(shift):
    """s'/(1−s') = shift·s/(1−s), and the ends stay."""
    s, shifted = FlowProcess(1000).sigmas[:-1], FlowProcess(1000, shift=shift).sigmas
    np.testing.assert_allclose(shifted[:-1] / (1 - shifted[:-1]), shift * s / (1 - s), rtol=1e-9)
    assert shifted[-1] == 1
    np.testing.assert_allclose(FlowProcess(1000, shift=shift).timestep_map, 1000 * shifted)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_where_it_is_installed(shift):
    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    process = FlowProcess(1000, shift=shift)
    np.testing.assert_allclose(process.sigmas[::-1], peer.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(process.timestep_map[::-1], peer.timesteps.numpy(), rtol=1e-6)


def test_respacing_keeps_the_levels_and_composes():
    process = FlowProcess(1000, shift=3.0, prediction="v")
    short = process.respace(50)
    kept = process.spaced(50)
    np.testing.assert_array_equal(short.sigmas, process.sigmas[kept])
    np.testing.assert_array_equal(short.timestep_map, process.timestep_map[kept])
    assert (short.num_timesteps, short.shift, short.prediction) == (50, 3.0, "v")
    np.testing.assert_array_equal(short.keep([0, 49]).sigmas, process.sigmas[[0, 999]])
    assert process.spaced(4, "trailing") == [249, 499, 749, 999]
    for table in (process.sigmas, process.timestep_map, short.sigmas):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


def test_tables_and_transitions():
    process = FlowProcess(8)
    tables = process.tables("cpu")
    assert tables.sqrt_alphas_cumprod.dtype == torch.float64
    np.testing.assert_array_equal(tables.sqrt_alphas_cumprod, 1 - process.sigmas)
    np.testing.assert_array_equal(tables.sqrt_one_minus_alphas_cumprod, process.sigmas)
    steps = transitions(process)
    np.testing.assert_array_equal(steps.sigma, process.sigmas[::-1])
    np.testing.assert_array_equal(steps.sigma_next, [*process.sigmas[-2::-1], 0])
    np.testing.assert_array_equal(steps.alpha + steps.sigma, np.ones(8))
    np.testing.assert_array_equal(steps.times, process.timestep_map[::-1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_timesteps": 0}, "num_timesteps is 0"),
        ({"shift": 0.0}, "shift is 0.0; it must be positive"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"prediction": "x_prev"}, "prediction is 'x_prev'; it may be one of 'flow', 'x0', 'eps', 'v'"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FlowProcess(**kwargs)


def test_steps_and_timesteps_out_of_range():
    with pytest.raises(ValueError, match=r"steps is 11; it must be in \[1, 10\]"):
        FlowProcess(10).respace(11)
    with pytest.raises(ValueError, match=r"timesteps must rise within \[0, 10\)"):
        FlowProcess(10).keep([3, 10])
