"""Noising against the gather, two products and a sum of eager PyTorch."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.conftest import assert_close
from diffkern.backends import use_backend
from diffkern.ops import q_sample
from diffkern.process import GaussianProcess, linear_betas

SHAPES = [(256, 3, 32, 32), (64, 3, 64, 64), (16, 3, 256, 256)]


@pytest.mark.parametrize("generated", [False, True], ids=["given", "generated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_sample(compare, shape, generated):
    torch.manual_seed(0)
    x0, noise, t = torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, shape[:1])
    tables = GaussianProcess(linear_betas(1000)).tables("cpu")
    signal, sigma = tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod
    source = {"seed": 1} if generated else {"noise": noise}
    with use_backend("reference"):
        expected = q_sample(x0.double(), t, signal, sigma, **({"seed": 1} if generated else {"noise": noise.double()}))
    signal32, sigma32 = signal.float(), sigma.float()
    compare(
        "q_sample",
        f"{'×'.join(map(str, shape))}, noise {'generated' if generated else 'given'}",
        "randn_like + eager" if generated else "eager",
        lambda: q_sample(x0, t, signal, sigma, **source),
        lambda: eager.q_sample(x0, t, signal32, sigma32, None if generated else noise),
        bytes_moved=(8 if generated else 12) * x0.numel(),
        check=assert_close(expected),
    )
