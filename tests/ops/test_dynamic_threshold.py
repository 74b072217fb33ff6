"""dynamic_threshold: exactly the quantile of what the step clamps, whatever the values are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffkern import backends
from diffkern.ops import dynamic_threshold, solver_step
from diffkern.solvers.program import StepProgram, columns
from tests.ops import oracles, programs
from tests.ops.cases import DTYPES, error, in_layout, randn, same_bits

native = pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")


def with_column(program: StepProgram, name: str, value: float) -> StepProgram:
    coefficients = program.coefficients.copy()
    coefficients[:, columns(program.num_slots).index(name)] = value
    coefficients.setflags(write=False)
    return replace(program, coefficients=coefficients)


def thresholded(ratio: float, largest: float = 1e30) -> StepProgram:
    return programs.program(3, zero=("c_e", "c_v", "c_z", "s"), threshold=(ratio, largest))


def quantile(magnitudes: Tensor, ratio: float) -> Tensor:
    """By sorting, and at least 1."""
    ordered = magnitudes.flatten(1).double().sort(1).values
    position = ratio * (ordered.shape[1] - 1)
    low = int(position)
    high = min(low + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], position - low).clamp(min=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("guided", [False, True])
def test_it_is_exact_for_what_the_step_clamps(backend, layout, dtype, guided):
    """x0 as the step's own pass gives it, from a program whose clamp is out of reach: to the last bit."""
    n, wide = (6 if guided else 3), torch.float64 if dtype == torch.float64 else torch.float32
    x, output = in_layout(20 * randn(3, 5, 13, 37).to(dtype), layout), randn(n, 5, 13, 37, seed=1).to(dtype)
    options = {"guidance_scale": torch.tensor([0.5, 7.5, -1.0])} if guided else {}
    whole = with_column(programs.program(3, zero=programs.keep(("a_x", "a_m", "c_0")), clip=(-1e30, 1e30)), "c_0", 1.0)
    for ratio in (0.25, 0.5, 0.9, 0.995, 1.0):
        limited = thresholded(ratio)
        found = dynamic_threshold(x, output, limited, 1, **options)
        if wide == dtype:
            x0 = solver_step(x, output, whole, 1, **options)
            assert error(found, quantile(x0.abs(), ratio)) < 2.0**-52  # the interpolation's own rounding
        arguments = (x.double(), output.double(), limited, torch.tensor([1, 1, 1]))
        exact = oracles.dynamic_threshold(*arguments, options.get("guidance_scale"))
        assert error(found, exact) < (1e-14 if dtype == torch.float64 else 1e-6)


def mixed_values(size: int, wide: torch.dtype) -> Tensor:
    """(8, size): ties, zeros of both signs, subnormals, infinities, any number of NaN."""
    mixed = randn(8, size).to(wide)
    mixed[1] = mixed[1].sign()
    mixed[2] = 3.0
    mixed[3] = (randn(size, seed=1) * 2).round().to(wide)
    mixed[4] = mixed[4] * torch.finfo(wide).smallest_normal
    mixed[5, ::3] = torch.inf
    mixed[6, ::2] = -torch.nan
    mixed[7] = (randn(size, seed=2) * 30).exp().to(wide)
    return mixed


@native
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 100, 1000, 4099])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_every_rank_of_any_values(size, wide):
    """Against sorting."""
    mixed = mixed_values(size, wide)
    # Nearly all is above 1, where the quantile shows.
    program = with_column(
        programs.program(16, zero=programs.keep(("a_x", "c_0")), threshold=(0.9, 1e30)), "a_x", 2.0**20
    )
    for ratio in {rank / max(size - 1, 1) for rank in range(0, size, size // 40 + 1)} | {0.3, 0.995, 1.0}:
        if ratio == 0:
            continue
        limited = replace(program, threshold=(ratio, 1e30))
        with backends.use_backend("reference"):
            expected = dynamic_threshold(mixed, mixed, limited, 0)
        with backends.use_backend("native"):
            assert error(dynamic_threshold(mixed, mixed, limited, 0), expected) < 1e-15


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("size", [1, 2, 65, 130])
def test_ranks_of_any_values_over_several_tiles(backend, size, monkeypatch):
    """Against sorting; the neighbours of a rank in one tile, in two, or in all."""
    from diffkern.ops._triton.elementwise import Elementwise
    from diffkern.ops.dynamic_threshold import triton

    monkeypatch.setattr(triton, "choose", lambda size: Elementwise(64, 1))
    mixed = mixed_values(size, torch.float32)
    program = with_column(
        programs.program(16, zero=programs.keep(("a_x", "c_0")), threshold=(0.9, 1e30)), "a_x", 2.0**20
    )
    for ratio in (1 / max(size - 1, 1), 0.5, 0.97, 1.0):
        limited = replace(program, threshold=(ratio, 1e30))
        with backends.use_backend("reference"):
            expected = dynamic_threshold(mixed, mixed, limited, 0)
        assert error(dynamic_threshold(mixed, mixed, limited, 0), expected) < 1e-15


def test_nan_counts_as_the_largest_value_and_stays_in_its_sample(backend):
    """As torch's sort has it: below the quantile's rank a few do not matter, and no other sample sees them."""
    x, output = 5 * randn(3, 1, 10, 10), randn(3, 1, 10, 10, seed=1)
    for count, expected in [(5, False), (15, True)]:
        spoilt = x.clone()
        spoilt[1].view(-1)[:count] = torch.nan
        found = dynamic_threshold(spoilt, output, thresholded(0.9), 0)
        assert found.isnan().tolist() == [False, expected, False]
        clean = dynamic_threshold(x, output, thresholded(0.9), 0)
        assert same_bits(found[[0, 2]], clean[[0, 2]])


def test_it_lies_between_one_and_the_largest(backend):
    x, output = torch.stack([0.1 * randn(64), randn(64), 100 * randn(64)]), randn(3, 64, seed=1)
    s = dynamic_threshold(x, output * 0, thresholded(0.9, 1.5), 0)
    assert s[0] == 1
    assert s[2] == 1.5
    # diffusers allows a largest value below 1, which then comes first, as in torch.clamp.
    assert dynamic_threshold(x, output * 0, thresholded(0.9, 0.5), 0).tolist() == [0.5] * 3
    assert dynamic_threshold(torch.empty(2, 0, 3), torch.empty(2, 0, 3), thresholded(0.9), 0).tolist() == [1, 1]
    assert dynamic_threshold(torch.empty(0, 2), torch.empty(0, 2), thresholded(0.9), 0).shape == (0,)


def test_what_x0_does_not_take_is_not_read(backend):
    for kept, read in (("a_m", 1), ("a_x", 0)):
        program = programs.program(16, zero=programs.keep((kept, "c_0")), threshold=(0.9, 3.0))
        pair = [3 * randn(2, 50), 3 * randn(2, 50, seed=1)]
        clean = dynamic_threshold(*pair, program, 0)
        pair[1 - read].fill_(torch.nan)
        assert same_bits(dynamic_threshold(*pair, program, 0), clean)


@pytest.mark.parametrize("guided", [False, True])
def test_gradcheck(backend, guided):
    """Far from ties; also where a bound holds, and at the last rank."""
    for shape, (ratio, largest) in [
        ((2, 3, 3), (0.8, 30.0)),
        ((3, 7), (1.0, 30.0)),
        ((2, 8), (0.5, 1.2)),
        ((3,), (1, 9)),
    ]:
        x = (4 * randn(*shape, dtype=torch.float64)).requires_grad_()
        samples = shape[0] * (2 if guided else 1)
        output = randn(samples, *shape[1:], seed=1, dtype=torch.float64).requires_grad_()
        rescale = torch.linspace(0.5, 1.5, shape[0], dtype=torch.float64).requires_grad_()
        program = thresholded(ratio, largest)

        def function(x, output, rescale, program=program):
            options = {"guidance_scale": 2.0, "rescale": rescale} if guided else {}
            return dynamic_threshold(x, output, program, 1, **options)

        assert torch.autograd.gradcheck(function, (x, output, rescale))


def test_gradients_compiled_for_any_size(backend):
    torch._dynamo.reset()
    program = thresholded(0.9)
    fast = torch.compile(
        lambda x, m: dynamic_threshold(x, m, program, 1, guidance_scale=2.0),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for shape in [(6, 8, 5, 7), (5, 8, 11, 13)]:
        leaves = [(9 * randn(*shape)).requires_grad_(), randn(2 * shape[0], *shape[1:], seed=1).requires_grad_()]
        with torch._dynamo.config.patch(error_on_recompile=shape[0] == 5):
            found = torch.autograd.grad(fast(*leaves).sum(), leaves)
        expected = torch.autograd.grad(dynamic_threshold(*leaves, program, 1, guidance_scale=2.0).sum(), leaves)
        for f, e in zip(found, expected, strict=True):
            assert error(f, e) < 1e-6
    torch._dynamo.reset()


def test_bad_arguments(backend):
    x = randn(2, 3)
    program = thresholded(0.9)
    for arguments, options, kind, message in [
        ((x.long(), x, program, 0), {}, TypeError, "x must be"),
        ((x, x[:1], program, 0), {}, ValueError, "model_output must have shape"),
        ((x, x, programs.PLAIN, 0), {}, ValueError, "program must have a threshold"),
        ((x, x, program, 3), {}, ValueError, r"row must lie in \[0, 3\), got 3"),
        ((x, x, program, torch.tensor([0, -1])), {}, ValueError, r"row must lie in \[0, 3\), got -1 at position 1"),
        ((x, x, program, 0), {"rescale": torch.ones(2)}, ValueError, "rescale needs guidance_scale"),
        ((x, torch.cat([x, x]), program, 0), {"guidance_scale": "2"}, TypeError, "guidance_scale must be"),
        (
            (x, torch.cat([x, x]), program, 0),
            {"guidance_scale": 2.0, "rescale": torch.ones(3)},
            ValueError,
            "rescale must have shape",
        ),
    ]:
        with pytest.raises(kind, match=message):
            dynamic_threshold(*arguments, **options)
