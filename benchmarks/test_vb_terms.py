"""The hybrid loss with its gradient, and one term of the bound, against the same in broadcast tensor operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import assert_close
from benchmarks.eager_bound import EagerBound
from diffkern.backends import use_backend
from diffkern.ops import diffusion_loss_and_grad, philox_normal, q_sample, vb_terms
from diffkern.process import GaussianProcess, linear_betas

SHAPE = (256, 3, 32, 32)


class Batch:
    """Images of 256 grey levels at timesteps of all sizes, and a network near its target."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.tables = GaussianProcess(linear_betas(1000), variance="learned_range").tables(device)
        self.x0 = (torch.randint(256, SHAPE) / 127.5 - 1).to(device)
        self.noise = philox_normal(SHAPE, 1, stream=3, device=device)
        self.t = torch.randint(0, 1000, SHAPE[:1]).to(device)
        signal, sigma = self.tables[:2]
        self.x_t = q_sample(self.x0, self.t, signal, sigma, noise=self.noise)
        mean = self.noise + 0.1 * torch.randn(SHAPE).to(device)
        self.output = torch.cat([mean, 0.3 * torch.randn(SHAPE).to(device)], dim=1).requires_grad_()


@pytest.mark.parametrize("generated", [False, True], ids=["given", "generated"])
def test_hybrid(compare, device, generated):
    batch, scale = Batch(device), 1 / SHAPE[0]
    source = {"seed": 1} if generated else {"noise": batch.noise}

    def ours():
        return diffusion_loss_and_grad(
            batch.output, batch.x0, batch.t, batch.tables, scale=scale, loss="hybrid", **source
        )

    with use_backend("reference"):
        expected = diffusion_loss_and_grad(
            batch.output.double(),
            batch.x0.double(),
            batch.t,
            batch.tables,
            scale=scale,
            loss="hybrid",
            noise=batch.noise.double(),
        )
    checks = [assert_close(part.detach(), 4e-6) for part in expected]
    eager = EagerBound(batch.tables)
    compare(
        "diffusion_loss_and_grad",
        f"hybrid, learned Σ, {'×'.join(map(str, SHAPE))}, noise {'generated' if generated else 'given'}",
        "eager, noise given",
        ours,
        lambda: eager.hybrid_and_grad(batch.output, batch.x0, batch.t, batch.noise, scale),
        bytes_moved=(5 if generated else 6) * batch.x0.nbytes,
        check=lambda result: [check(part) for check, part in zip(checks, result, strict=True)],
        within="vb_terms_and_grad",
        headline=not generated,
    )


def test_vb_terms(compare, device):
    batch = Batch(device)
    output, eager = batch.output.detach(), EagerBound(batch.tables)
    with use_backend("reference"):
        expected = vb_terms(output.double(), batch.x0.double(), batch.t, batch.tables, x_t=batch.x_t.double()).vb
    compare(
        "vb_terms",
        f"learned Σ, {'×'.join(map(str, SHAPE))}",
        "eager",
        lambda: vb_terms(output, batch.x0, batch.t, batch.tables, x_t=batch.x_t).vb,
        lambda: eager.term(output, batch.x0, batch.x_t, batch.t),
        bytes_moved=4 * batch.x0.nbytes,
        check=assert_close(expected, 4e-6),
        headline=True,
    )
