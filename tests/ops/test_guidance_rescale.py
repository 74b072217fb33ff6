"""guidance_rescale: exact beside any mean, and its place in a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern import backends
from diffkern.ops import dynamic_threshold, guidance_rescale, solver_step
from tests.ops import oracles, programs
from tests.ops.cases import DTYPES, error, in_layout, randn, same_bits

native = pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e6])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 61, 67), (3, 2050), (2, 2), (1, 128, 9, 9)])
def test_no_digits_are_lost_to_a_mean(backend, shape, mean):
    """Deviations in float64: what float32 values lose in squaring shows at once."""
    halves = [randn(*shape, seed=seed, dtype=torch.float64) + mean for seed in (1, 2)]
    output = torch.cat(halves).float()
    found = guidance_rescale(output, 2.5, 0.7)
    uncond, cond = output.double().chunk(2)
    ratio = oracles.unbiased_std(cond) / oracles.unbiased_std(uncond + 2.5 * (cond - uncond))
    assert error(found, 0.7 * ratio + 0.3) < 1e-12 * max(1.0, abs(mean))
    assert found.dtype == torch.float64


def test_a_chunk_of_another_level_is_joined_right(backend):
    """Pieces of a sample with means far apart, the first of them constant."""
    output = randn(2, 3, 64, 64, seed=3)
    output[:, 0] = 1e4
    output[:, 2] -= 1e4
    expected = oracles.guidance_rescale(output.double(), torch.tensor([3.0]).double(), 1.0)
    assert error(guidance_rescale(output, 3.0, 1.0), expected) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "offset"])
def test_layouts_agree(backend, layout, dtype):
    output = randn(6, 5, 9, 31, seed=4).to(dtype)
    scale = torch.tensor([0.5, 2.0, 7.5])
    found = guidance_rescale(in_layout(output, layout), scale, 0.6)
    assert error(found, guidance_rescale(output, scale, 0.6)) < 1e-14


def test_the_mean_channels_of_a_learned_variance_alone(backend):
    """The variance's channels, NaN here, are no part of the deviations."""
    x, output = randn(2, 3, 8, 8), randn(4, 6, 8, 8, seed=1)
    expected = guidance_rescale(output[:, :3].contiguous(), 2.0, 0.5)
    output[:, 3:] = torch.nan
    assert same_bits(guidance_rescale(output[:, :3], 2.0, 0.5), expected)
    program = programs.program(15, zero=("c_z", "c_e", "c_v", "s"), variance="learned")
    assert bool(solver_step(x, output, program, 0, guidance_scale=2.0, guidance_rescale=0.5, seed=1).isfinite().all())


def test_where_there_is_no_deviation(backend):
    assert guidance_rescale(randn(6, 1), 2.0, 0.7).tolist() == [1.0] * 3
    assert guidance_rescale(randn(6), 2.0, 0.7).tolist() == [1.0] * 3
    assert guidance_rescale(randn(4, 0, 3), 2.0, 0.7).tolist() == [1.0] * 2
    assert guidance_rescale(randn(0, 3, 3), 2.0, 0.7).shape == (0,)
    constant = guidance_rescale(torch.full((4, 3, 30, 30), 0.1), 2.0, 0.7)
    assert bool(constant.isnan().all())  # 0/0, and no ratio of two rounding errors


def test_gradcheck(backend):
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
    for shape in [(4, 5), (4, 2, 3), (4, 1, 2, 2)]:
        output = randn(*shape, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda output: guidance_rescale(output, scale, 0.7), output)
    constant = torch.full((2, 6), 0.1, dtype=torch.float64)
    constant[0] = randn(6)
    constant.requires_grad_()
    (gradient,) = torch.autograd.grad(guidance_rescale(constant, 0.5, 0.7).sum(), constant)
    assert bool(gradient.isfinite().all())


@native
def test_no_tensor_of_full_size_and_no_sort():
    """What the kernels replace: a step with both scales allocates no more than the scratch of one sample a thread."""
    program = programs.program(3, zero=("c_e", "c_v", "c_z", "s"), threshold=(0.9, 2.0))
    x, output, out = randn(64, 3, 16, 16), randn(128, 3, 16, 16, seed=1), torch.empty(64, 3, 16, 16)

    def step() -> Tensor:
        return solver_step(x, output, program, 1, guidance_scale=2.0, guidance_rescale=0.5, out=out)

    step()
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        step()
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::sort", "aten::std", "aten::quantile", "aten::sub", "aten::mul"}
    allocated = [event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0]
    assert sum(allocated) < 2 * torch.get_num_threads() * x[0].nbytes


def test_bad_arguments(backend):
    x = randn(4, 3)
    for arguments, kind, message in [
        ((x[:3], 2.0, 0.5), ValueError, "model_output must be"),
        ((x.long(), 2.0, 0.5), TypeError, "model_output must be"),
        ((x, torch.ones(4), 0.5), ValueError, "guidance_scale must have shape"),
        ((x, None, 0.5), TypeError, "guidance_scale must be a number"),
        ((x, 2.0, 1.5), ValueError, r"phi must lie in \[0, 1\], got 1.5"),
        ((x, 2.0, "1"), TypeError, "phi must be a number"),
    ]:
        with pytest.raises(kind, match=message):
            guidance_rescale(*arguments)


def test_the_step_uses_both(backend):
    """r first, then s of the rescaled mean, then the pass."""
    program = programs.program(3, zero=programs.keep(("a_x", "a_m", "c_0")), threshold=(0.9, 2.0))
    x, output = randn(3, 4, 9, 7), randn(6, 4, 9, 7, seed=1)
    r = guidance_rescale(output, 2.0, 0.5)
    s = dynamic_threshold(x, output, program, 1, guidance_scale=2.0, rescale=r)
    assert bool(((s > 1) & (s < 2)).any())
    found = solver_step(x, output, program, 1, guidance_scale=2.0, guidance_rescale=0.5)
    largest = found.abs().flatten(1).amax(1) / abs(program.column("c_0")[1])
    torch.testing.assert_close(largest, torch.ones(3), rtol=1e-6, atol=0)
