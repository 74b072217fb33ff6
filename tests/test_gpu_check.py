"""`make gpu-check`: what it writes, and what it says without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check, rows
from benchmarks.goals import Goal
from benchmarks.timing import Timing
from tests.conftest import ROOT
from tests.gpu.calls import CALLS

XML = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="good"/>
<testcase classname="tests.gpu.test_a" name="left"><skipped message="no"/></testcase>
<testcase classname="tests.gpu.test_a" name="bad"><failure message="assert 1 ==&#10;2">trace</failure></testcase>
<testcase classname="tests.gpu.test_a" name="worse"><error message="no fixture">trace</error></testcase>
</testsuite></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_2(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: torch ")
    assert "no NVIDIA GPU" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


ABSENT = {"result": "absent", "detail": "not here"}
HIDDEN = ("tyro", "rich", "tqdm", "hypothesis", "diffusers", "safetensors", "accelerate", "matplotlib", "scipy",
          "sklearn", "PIL")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "collected"),
    [(["-m", "gpu", "tests/gpu"], "test_replays_follow_row_and_seed"), (["benchmarks"], "test_training_step")],
    ids=["tests", "benchmarks"],
)
def test_collecting_needs_no_more_than_torch_numpy_and_pytest(run_python, arguments, collected):
    """A machine with a GPU may have no more. Plugins are left out because they bring packages of their own."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))  # importing them raises
import pytest
plugins = ["-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin"]
sys.exit(pytest.main(["-q", "--collect-only", *plugins, *{arguments!r}]))
"""
    assert collected in run_python(code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def test_failures_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "pytest", lambda *_: (tmp_path / "tests.xml").write_text(XML))
    found = gpu_check.run_tests(tmp_path)
    assert {name: found[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["failures"]["tests.gpu.test_a::worse"] == "no fixture"
    about = {"gpu": "a GPU", "driver": "1.2", "torch": "2.11", "command": "make gpu-check VENV="}
    page = gpu_check.page(about, found, ABSENT, [])
    assert "- gpu: a GPU\n- driver: 1.2\n- cuda: unknown\n" in page
    assert "1 passed, 2 failed, 1 skipped" in page
    assert "- tests.gpu.test_a::bad: assert 1 == 2" in page
    assert "compute-sanitizer: absent (not here)." in page


def test_no_report_of_the_tests_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "pytest", lambda *_: 4)
    assert gpu_check.run_tests(tmp_path) == {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    assert gpu_check.run_benchmarks(tmp_path, 1) == (4, [])


def test_one_json_and_one_page(tmp_path):
    times = Timing(1e-6, 2e-6, 3e-6, (2e-6,))
    row = rows.subject("q_sample", "4×4", "eager", "cpu", headline=False) | rows.figures(times, times, 8, 1e9)
    row |= Goal("ratio", 0.9, 1.1).fields(row)
    tests = {"passed": 3, "failed": 0, "skipped": 0, "failures": {}}
    gpu_check.write(tmp_path / "out", {"gpu": "a GPU"}, tests, ABSENT, [row])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu-check.json", "gpu-check.md"]
    saved = rows.load(tmp_path / "out" / "gpu-check.json")
    assert (saved["machine"], saved["tests"], saved["rows"]) == ({"gpu": "a GPU"}, tests, [row])
    assert saved["sanitizer"] == ABSENT
    page = (tmp_path / "out" / "gpu-check.md").read_text()
    assert "| q_sample | 4×4 | 1.00 | 0.90 | 1.10 | yes | eager 1.00 |" in page
    assert "| q_sample | 4×4 | eager | — | 2 | 2 (1–3) |" in page


def sanitizer(folder, script):
    """An executable of that name, on its own in `folder`."""
    program = folder / "compute-sanitizer"
    program.write_text(f"#!{sys.executable}\n{script}\n")
    program.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(("status", "result"), [(0, "passed"), (66, "failed"), (1, "failed")])
def test_the_sanitizer_runs_a_part_of_the_tests(tmp_path, monkeypatch, status, result):
    """It is given a command of pytest, and torch hands it every allocation."""
    script = f"""import os, sys
assert sys.argv[1:3] == ["--tool", "memcheck"] and "--error-exitcode" in sys.argv
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert "tests/gpu/test_values.py" in sys.argv[sys.argv.index("pytest"):]
print("14 passed, 268 deselected")
print("========= ERROR SUMMARY: 0 errors")
sys.exit({status})"""
    monkeypatch.setenv("PATH", sanitizer(tmp_path, script))
    found = gpu_check.run_sanitizer()
    assert found["result"] == result
    assert "14 passed" in found["detail"]
    assert "ERROR SUMMARY: 0 errors" in found["detail"]
    assert f"exit status {status}" in found["detail"]


def test_a_sanitizer_that_never_ends_has_failed_and_one_that_is_missing_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.run_sanitizer()["result"] == "absent"
    sanitizer(tmp_path, "import time; time.sleep(60)")
    monkeypatch.setattr(gpu_check, "_SANITIZER_SECONDS", 1)
    assert gpu_check.run_sanitizer() == {"result": "failed", "detail": "memcheck took more than 1 s"}


def test_what_the_sanitizer_is_given_is_every_op_of_the_kernels(run_python):
    code = f"""
import sys, pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *{gpu_check.SANITIZED!r}]))
"""
    listed = run_python(code)
    assert "reference" not in listed
    for name in CALLS:
        assert f"test_values[triton-{name}-" in listed


def test_kernels_are_compiled_there_and_not_interpreted(monkeypatch):
    """The tests interpret them otherwise, on a machine with a GPU too."""
    seen = []

    def run(command, **options):
        seen.append(options["env"]["TRITON_INTERPRET"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    assert gpu_check.pytest("tests/gpu") == 0
    assert seen == ["0"]
