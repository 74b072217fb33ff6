"""Every kernel exists once per instruction set: those that are not chosen here run the tests of values too."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from diffkern import backends
from tests.conftest import ROOT

FILES = [
    "test_contract.py",
    "test_philox_uint32.py",
    "test_philox_normal.py",
    "test_solver_step_memory.py",
    "test_group_norm.py",
    "test_group_norm_extremes.py",
    "test_group_norm_gradients.py",
    "test_diffusion_loss.py",
    "test_diffusion_loss_gradients.py",
]
SETS = ("portable", "avx2", "avx512")
ISA = "from diffkern import backends; print(backends.unavailable('native') or backends.native_module().isa)"

pytestmark = pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")


@pytest.mark.skipif("DIFFKERN_CPU" in os.environ, reason="the whole suite runs on one instruction set already")
def test_every_set_passes_the_tests_of_values(run_python):
    """Those that exist here and are not the default; side by side, since each has a process of its own."""
    others = [isa for isa in SETS if isa != backends.native_module().isa]
    others = [isa for isa in others if run_python(ISA, DIFFKERN_CPU=isa) == isa]
    assert "portable" in [*others, backends.native_module().isa]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "native"]
    runs = {
        isa: subprocess.Popen(
            [*command, *(f"tests/ops/{name}" for name in FILES)],
            env={**os.environ, "DIFFKERN_CPU": isa},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for isa in others
    }
    told = {isa: run.communicate(timeout=300)[0] for isa, run in runs.items()}
    for isa, run in runs.items():
        assert run.returncode == 0, f"DIFFKERN_CPU={isa}\n{told[isa][-5000:]}"


def test_an_unknown_set_is_explained(run_python):
    """The native backend is then missing, with the reason; asked for by name it raises."""
    assert "DIFFKERN_CPU must be portable" in run_python(ISA, DIFFKERN_CPU="sse9")


def test_portable_agrees_with_the_chosen_set(run_python):
    """The integers to the last bit, float32 to rounding."""
    code = """
import numpy as np, torch
from diffkern.ops import group_norm, philox_normal, philox_uint32
x = torch.linspace(-3, 5, 2 * 12 * 7 * 9).reshape(2, 12, 7, 9)
results = [philox_uint32((2, 37), 5), philox_normal((2, 3000), 5), group_norm(x, 3, activation="silu")]
print(b"".join(r.numpy().astype(np.float64).tobytes() for r in results).hex())
"""
    a, b = (
        np.frombuffer(bytes.fromhex(run_python(code, **env)), np.float64) for env in ({}, {"DIFFKERN_CPU": "portable"})
    )
    np.testing.assert_array_equal(a[:74], b[:74])
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
