"""diffusers' own scheduler tests, with our classes in the place of theirs.

DIFFKERN_DIFFUSERS_TESTS=<checkout of huggingface/diffusers>/tests runs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
import unittest
from pathlib import Path

import pytest

FOLDER = os.environ.get("DIFFKERN_DIFFUSERS_TESTS")
FILES = {
    "DDIMInverseScheduler": "test_scheduler_ddim_inverse",
    "DDIMScheduler": "test_scheduler_ddim",
    "DDPMScheduler": "test_scheduler_ddpm",
    "DPMSolverMultistepScheduler": "test_scheduler_dpm_multi",
    "EulerAncestralDiscreteScheduler": "test_scheduler_euler_ancestral",
    "EulerDiscreteScheduler": "test_scheduler_euler",
    "HeunDiscreteScheduler": "test_scheduler_heun",
    "PNDMScheduler": "test_scheduler_pndm",
    "UniPCMultistepScheduler": "test_scheduler_unipc",
}

# Tests that hold an error of diffusers' own, by class.
THEIR_ERRORS = {
    # β_1 and the weights of the step from t = 1 are good to 3e-4 in float32: the test holds a sum of 387.9466 ± 0.01,
    # diffusers' class run in float64 gives 387.9673, and so does ours.
    "DDPMScheduler": {"test_full_loop_with_noise"},
    # The same: 57062.93 and 75074.89 ± 0.01 are held, diffusers' classes run in float64 give 57062.857 and 75074.865.
    "EulerDiscreteScheduler": {"test_full_loop_with_noise"},
    "HeunDiscreteScheduler": {"test_full_loop_with_noise"},
}

pytestmark = pytest.mark.skipif(not FOLDER, reason="DIFFKERN_DIFFUSERS_TESTS names no checkout's tests")


@pytest.fixture(scope="module", autouse=True)
def their_tests():
    """The checkout's `tests` as a package of its own name, so that it does not meet ours."""
    path = Path(FOLDER) / "__init__.py"
    spec = importlib.util.spec_from_file_location("diffusers_tests", path, submodule_search_locations=[FOLDER])
    sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
    if path.exists():
        spec.loader.exec_module(sys.modules["diffusers_tests"])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_tests"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", FILES)
def test_their_tests_pass_with_our_class(name):
    """Those that pass with diffusers' own: some need libraries that may be missing."""
    problems = run(name, getattr(pytest.importorskip("diffusers"), name))
    excused = {test.split(".")[-1] for test in problems} | THEIR_ERRORS.get(name, set())
    ours = importlib.import_module("diffkern.integrations.diffusers")
    for test, trace in run(name, getattr(ours, name)).items():
        assert test.split(".")[-1] in excused, f"{test}\n{trace}"


def run(name, scheduler):
    """The tests of the class called `name`, run with `scheduler`: a traceback for each that fails."""
    file = importlib.import_module(f"diffusers_tests.schedulers.{FILES[name]}")
    common = importlib.import_module("diffusers_tests.schedulers.test_schedulers")
    cases = [
        case
        for case in vars(file).values()
        if isinstance(case, type) and issubclass(case, common.SchedulerCommonTest) and case.__module__ == file.__name__
    ]
    suite = unittest.TestSuite()
    with pytest.MonkeyPatch.context() as patch:
        for module in (file, common):  # which compare scheduler classes by identity
            if hasattr(module, name):
                patch.setattr(module, name, scheduler)
        for case in cases:
            patch.setattr(case, "scheduler_classes", (scheduler,))
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(case))
        result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    assert result.testsRun > 10, f"{FILES[name]} holds no tests"
    return {case.id(): trace for case, trace in result.errors + result.failures}
