"""Every kernel exists once per instruction set: those that are not chosen here run the tests of values too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diffkern import backends
from tests.conftest import ROOT

# Where sets have differed: the noise's rounding, the ends of float32, sums over many vectors.
FEW = [
    "test_contract.py",
    "test_philox_uint32.py",
    "test_philox_normal.py",
    "test_group_norm_extremes.py",
    "test_channel_rms_norm_extremes.py",
    "test_diffusion_loss.py",
    "test_dynamic_threshold.py",
    "test_guidance_rescale.py",
    "test_decoder.py",
    "test_vb_terms.py",
    "test_attention.py",
]
ALL = [
    *FEW,
    "test_mixed_dtypes.py",
    "test_properties.py",
    "test_solver_step_memory.py",
    "test_group_norm.py",
    "test_group_norm_gradients.py",
    "test_channel_rms_norm.py",
    "test_linear_attention.py",
    "test_diffusion_loss_gradients.py",
]
SETS = ("portable", "avx2", "avx512")
ISA = "from diffkern import backends; print(backends.unavailable('native') or backends.native_module().isa)"

pytestmark = pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")


@pytest.mark.skipif("DIFFKERN_CPU" in os.environ, reason="the whole suite runs on one instruction set already")
@pytest.mark.parametrize(
    ("files", "which"),
    [
        # A kernel does not know in which mode it was called: the cells with gradients call all of them.
        pytest.param(FEW, "native and (grad or not test_contract)", id="few"),
        pytest.param(ALL, "native or test_properties", id="all", marks=pytest.mark.slow),
    ],
)
def test_every_set_passes_the_tests_of_values(run_python, files, which):
    """Those that exist here and are not the default; side by side, since each has a process of its own."""
    others = [isa for isa in SETS if isa != backends.native_module().isa]
    others = [isa for isa in others if run_python(ISA, DIFFKERN_CPU=isa) == isa]
    assert "portable" in [*others, backends.native_module().isa]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", which]
    runs = {
        isa: subprocess.Popen(
            [*command, *(f"tests/ops/{name}" for name in files)],
            env={**os.environ, "DIFFKERN_CPU": isa},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for isa in others
    }
    told = {isa: run.communicate(timeout=500)[0] for isa, run in runs.items()}
    for isa, run in runs.items():
        assert run.returncode == 0, f"DIFFKERN_CPU={isa}\n{told[isa][-5000:]}"


def test_an_unknown_set_is_explained(run_python):
    """The native backend is then missing, with the reason; asked for by name it raises."""
    assert "DIFFKERN_CPU must be portable" in run_python(ISA, DIFFKERN_CPU="sse9")
