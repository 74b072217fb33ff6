"""Sums of samples in the Triton kernels: however a sample is spread over programs, its sums have the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diffkern import backends
from diffkern.ops import diffusion_loss_and_grad, vb_terms
from diffkern.process import GaussianProcess, linear_betas
from tests.ops.cases import in_layout, randn, same_bits

pytestmark = pytest.mark.skipif(backends.unavailable("triton") is not None, reason="no Triton")

TABLES = GaussianProcess(linear_betas(1000)).tables()
SHAPE = (2, 3, 9, 16)  # 432 values a sample: seven tiles of 64, in four segments


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Sets how many segments of two tiles of 64 elements a program has."""
    from diffkern.ops._triton import reduce

    def set_to(segments: int) -> None:
        monkeypatch.setattr(reduce, "choose", lambda size, count: reduce.Segmented(64, 4, 2))
        monkeypatch.setattr(reduce, "segments_per_program", lambda samples, count, device: min(segments, count))

    with backends.use_backend("triton"):
        yield set_to


def results(layout: str, spoiled: int | None = None) -> dict[str, Tensor]:
    output, x0 = in_layout(randn(2, 6, *SHAPE[2:]), layout), in_layout(randn(*SHAPE, seed=1).clamp(-1, 1), layout)
    if spoiled is not None:
        output[spoiled, 0, 3, 3] = torch.nan
    t = torch.tensor([0, 500])
    mse = diffusion_loss_and_grad(output[:, :3], x0, t, TABLES, target="v", seed=5, scale=0.5)
    hybrid = diffusion_loss_and_grad(
        output, x0, t, TABLES, loss="hybrid", variance="learned_range", seed=5, scale=torch.tensor(0.5)
    )
    terms = vb_terms(output, x0, t, TABLES, variance="learned", clip=(-1.0, 1.0), seed=5, decoder="exact")
    named = zip(("mse", "d_mse", "hybrid", "d_hybrid"), (*mse, *hybrid), strict=True)
    return {**dict(named), **terms._asdict()}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_spread_over_programs_has_the_same_sums(spread, layout):
    with backends.use_backend("reference"):
        expected = results(layout)
    found = {}
    for segments in (8, 3, 1):
        spread(segments)
        found[segments] = results(layout)
    for name, value in expected.items():
        torch.testing.assert_close(found[8][name], value, rtol=2e-5, atol=2e-6, msg=name)
        assert same_bits(found[3][name], found[8][name]), name
        assert same_bits(found[1][name], found[8][name]), name


def test_the_programs_leave_their_tickets_at_zero(spread):
    from diffkern.ops._triton.launch import tickets

    spread(1)
    first = results("contiguous")
    assert not tickets(2, torch.device("cpu")).any()
    again = results("contiguous")
    assert all(same_bits(first[name], again[name]) for name in first)


def test_nan_stays_in_its_sample_where_programs_share_one(spread):
    spread(1)
    clean, spoiled = results("contiguous"), results("contiguous", spoiled=1)
    for name, value in spoiled.items():
        assert same_bits(value[0], clean[name][0]), name
        assert bool(value[1].isnan().any()), name


def test_samples_alone_are_spread_and_large_batches_are_not():
    """What is chosen depends on the batch only in how many segments a program has."""
    from diffkern.ops._triton import reduce

    device = torch.device("cpu")
    small, large = (
        reduce.reduction((samples, 3, 256 * 256, False), device, generates=True) for samples in (1, 4 * 1024)
    )
    assert small.arguments["parts"] == small.arguments["segments"] == small.programs
    assert large.arguments["parts"] == 1
    assert large.programs == 4 * 1024
    for name in ("BLOCK", "TILES", "segments", "blocks"):
        assert small.arguments[name] == large.arguments[name]
    assert small.num_warps == large.num_warps
