"""A solver's step against the usual composition of tensor operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.conftest import assert_close
from diffkern.backends import use_backend
from diffkern.ops import solver_step
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import build

SHAPES = [(256, 3, 32, 32), (16, 3, 256, 256)]


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solver_step(compare, shape, solver):
    torch.manual_seed(0)
    process = GaussianProcess(linear_betas(1000))
    if solver == "ddpm":
        program, step = build("ddpm", process), eager.DDPMStep(process)
    else:
        program, step = build("ddim", process.respace(50)), eager.DDIMStep(process, 50)
    row = program.num_rows // 2
    x, output, out = torch.randn(shape), torch.randn(shape), torch.empty(shape)
    with use_backend("reference"):
        expected = solver_step(x.double(), output.double(), program, row, seed=1)
    compare(
        "solver_step",
        f"{solver}, {'×'.join(map(str, shape))}",
        "randn_like + eager" if solver == "ddpm" else "eager",
        lambda: solver_step(x, output, program, row, seed=1, out=out),
        lambda: step(x, output, row),
        bytes_moved=12 * x.numel(),
        check=assert_close(expected),
    )
