"""Noising against the gather, two products and a sum of eager PyTorch, and against their compiled form."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.baselines import compiled
from benchmarks.compare import assert_close
from diffkern.backends import use_backend
from diffkern.ops import q_sample
from diffkern.process import GaussianProcess, linear_betas

SHAPES = [(256, 3, 32, 32), (64, 3, 64, 64), (16, 3, 256, 256)]


class Case:
    def __init__(self, shape, generated, device):
        torch.manual_seed(0)
        self.x0, self.t = torch.randn(shape).to(device), torch.randint(0, 1000, shape[:1]).to(device)
        tables = GaussianProcess(linear_betas(1000)).tables(device)
        self.tables = tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod
        self.tables32 = [table.float() for table in self.tables]
        self.noise = None if generated else torch.randn(shape).to(device)
        self.source = {"seed": 1} if generated else {"noise": self.noise}
        exact = {"seed": 1} if generated else {"noise": self.noise.double()}
        with use_backend("reference"):
            self.check = assert_close(q_sample(self.x0.double(), self.t, *self.tables, **exact))
        self.name = f"{'×'.join(map(str, shape))}, noise {'generated' if generated else 'given'}"
        self.bytes_moved = (2 if generated else 3) * self.x0.nbytes

    def ours(self):
        return q_sample(self.x0, self.t, *self.tables, **self.source)


@pytest.mark.parametrize("generated", [False, True], ids=["given", "generated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_sample(compare, device, shape, generated):
    case = Case(shape, generated, device)
    compare(
        "q_sample",
        case.name,
        "randn_like + eager" if generated else "eager",
        case.ours,
        lambda: eager.q_sample(case.x0, case.t, *case.tables32, case.noise),
        bytes_moved=case.bytes_moved,
        check=case.check,
        headline=shape == SHAPES[0],
    )


@pytest.mark.parametrize("generated", [False, True], ids=["given", "generated"])
def test_q_sample_compiled(compare, device, generated):
    """Noise of its own is drawn by the compiled code too, from Inductor's generator."""
    case = Case(SHAPES[0], generated, device)
    fused = compiled(eager.q_sample)
    compare(
        "q_sample",
        case.name,
        "torch.compile",
        case.ours,
        lambda: fused(case.x0, case.t, *case.tables32, case.noise),
        bytes_moved=case.bytes_moved,
        check=case.check,
        check_baseline=None if generated else case.check,
    )
