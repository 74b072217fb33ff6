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
