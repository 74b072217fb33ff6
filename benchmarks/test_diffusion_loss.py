"""The loss per sample and its gradient against F.mse_loss and autograd.

Eager reads the ε that q_sample left in memory; "generated" computes it again instead, so that it need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.compare import assert_close
from diffkern.backends import use_backend
from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, philox_normal
from diffkern.process import GaussianProcess, linear_betas

SHAPE = (256, 3, 32, 32)


@pytest.mark.parametrize("generated", [False, True], ids=["given", "generated"])
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "autograd"])
def test_diffusion_loss(compare, device, one_pass, generated):
    torch.manual_seed(0)
    count, scale = SHAPE[0], 1 / SHAPE[0]
    output, x0 = torch.randn(SHAPE).to(device).requires_grad_(), torch.randn(SHAPE).to(device)
    noise = philox_normal(SHAPE, 1, stream=3, device=device)
    t, tables = torch.randint(0, 1000, (count,)).to(device), GaussianProcess(linear_betas(1000)).tables(device)
    source = {"seed": 1} if generated else {"noise": noise}

    def ours() -> tuple[Tensor, Tensor]:
        if one_pass:
            return diffusion_loss_and_grad(output, x0, t, tables, scale=scale, **source)
        loss = diffusion_loss(output, x0, t, tables, **source)
        return loss, torch.autograd.grad(scale * loss.sum(), output)[0]

    with use_backend("reference"):
        expected = diffusion_loss_and_grad(output.double(), x0.double(), t, tables, scale=scale, noise=noise.double())
    compare(
        "diffusion_loss_and_grad" if one_pass else "diffusion_loss",
        f"{'×'.join(map(str, SHAPE))}, noise {'generated' if generated else 'given'}"
        + ("" if one_pass else ", forward + backward"),
        "eager, noise given",
        ours,
        lambda: eager.diffusion_loss_and_grad(output, noise, scale),
        bytes_moved=(8 if generated else 12) * output.numel(),
        check=both_close(expected),
        headline=one_pass and not generated,
    )


def both_close(expected: tuple[Tensor, Tensor]) -> Callable[[Any], None]:
    checks = [assert_close(part) for part in expected]

    def check(result: tuple[Tensor, Tensor]) -> None:
        for one, part in zip(checks, result, strict=True):
            one(part)

    return check
