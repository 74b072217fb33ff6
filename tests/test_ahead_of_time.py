"""Every Triton kernel compiles for sm_90 in its main configurations, without spilling, as the committed table says."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton

import diffkern.ops
from benchmarks.ahead_of_time import noted, problems
from benchmarks.ahead_of_time_cases import cases
from tests.conftest import ROOT, without_the_harness

COMMITTED = ROOT / "benchmarks" / "results" / "ahead-of-time" / "sm_90.json"
FEW = 300  # as many as `make test` has time for


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(the table of this run, what it printed)."""
    out = tmp_path_factory.mktemp("ahead-of-time")
    command = [sys.executable, "-m", "benchmarks.ahead_of_time", "--main", "--capabilities", "90", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=without_the_harness(), capture_output=True, text=True, timeout=1500)
    assert (out / "sm_90.json").exists(), done.stderr
    return json.loads((out / "sm_90.json").read_text()), done.stdout


def test_nothing_spills_and_float64_has_its_reason(compiled):
    table, printed = compiled
    assert printed.splitlines()[-1].startswith(f"{len(table['rows'])} kernels compiled, 0 problems"), printed
    assert not any(row["stack"] for row in table["rows"])
    assert len(table["rows"]) <= FEW


@pytest.mark.parametrize(("capability", "kib"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_more_shared_memory_than_a_block_may_have_is_a_problem(capability, kib):
    row = {"kernel": "a_kernel", "capability": capability, "case": "a case", "stack": 0, "float64": []}
    assert not list(problems([row | {"shared": kib * 1024}]))
    (found,) = problems([row | {"shared": kib * 1024 + 16}])
    assert f"sm_{capability}; a case): {kib * 1024 + 16} bytes of shared memory" in found


@pytest.mark.parametrize(("capability", "launches"), [(86, 1), (90, 3), (120, 1)])
def test_what_a_gpu_leaves_to_the_reference_is_not_launched_there(capability, launches):
    wide = next(c for c in cases() if c.op == "attention_backward" and "d = 512, float32" in c.name)
    assert len(noted(wide, capability)) == launches


def test_shared_memory_is_what_a_launch_asks_for(compiled):
    """Products on tensor cores have their operands there; it is not in the program's text, as CUDA's static one is."""
    assert all(row["shared"] for row in compiled[0]["rows"] if row["kernel"].startswith("attention"))


def test_every_kernel_is_among_them(compiled):
    names = set()
    for module in pkgutil.walk_packages(diffkern.ops.__path__, "diffkern.ops."):
        if "triton" in module.name:
            found = vars(importlib.import_module(module.name))
            names |= {name for name, value in found.items() if name.endswith("_kernel") and hasattr(value, "run")}
    assert names == {row["kernel"] for row in compiled[0]["rows"]}


def test_the_committed_table_is_this_one(compiled):
    """Made by python -m benchmarks.ahead_of_time --main --capabilities 90 --out benchmarks/results/ahead-of-time"""
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the committed table is Triton {committed['triton']}'s")
    assert compiled[0]["rows"] == committed["rows"]


def test_interpreted_kernels_are_not_compiled():
    command = [sys.executable, "-m", "benchmarks.ahead_of_time"]
    environment = without_the_harness() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "TRITON_INTERPRET is set" in done.stderr


LAUNCHER = """
import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

class Compiled:
    function = packed_metadata = None
    def launch_metadata(self, *arguments): return None
    def run(self, *arguments): launched.append(source)

def compile(compiled_source, **options):
    global source
    source = compiled_source
    return Compiled()

driver.set_active(Driver())
triton.compiler.compile = compile
launched = []

from benchmarks.ahead_of_time import Work, specialised
from diffkern.ops._triton.launch import launch

for case, noted, _ in Work(True, [90]).launches:
    noted.kernel.device_caches.clear()
    options = {"num_warps": noted.num_warps, "registers": noted.registers}
    assert set(noted.arguments) == set(noted.kernel.arg_names), noted.kernel.__name__
    launch(noted.kernel, noted.grid, torch.device("cpu"), **options, **noted.arguments)
    signature, constants, attributes = specialised(noted)
    assert launched[-1].signature == signature, case
    assert set(launched[-1].constants) == set(constants), case
    assert {path for path, value in launched[-1].attrs.items() if value} == set(attributes), case
print(len(launched))
"""


def test_tritons_own_launcher_takes_the_launches_and_specialises_them_alike(run_python, compiled):
    """Without a GPU: its driver and its compiler are stand-ins, what lies between the call and them is Triton's."""
    assert int(run_python(LAUNCHER, timeout=300)) == len(compiled[0]["rows"])
