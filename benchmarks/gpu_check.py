"""`make gpu-check`: what only a GPU can show, in one command, as one JSON file and one Markdown page.

Runs the tests of tests/gpu, some of them once more under compute-sanitizer if that is installed, then every benchmark
on the GPU. Exit status: 0 if all passed, 1 if a test, the sanitizer or a benchmark's check failed, 2 without a GPU.
Needs torch, numpy, pytest and pytest-benchmark; a baseline that is missing is named as such in its row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import report, rows
from benchmarks.machine import ROOT, machine

# Each op once, in the layout whose addresses are the less obvious ones.
SANITIZED = ("tests/gpu/test_values.py", "-k", "triton and test_values and bfloat16 and memory_format1")
COMPILED = {"TRITON_INTERPRET": "0"}  # the tests interpret kernels unless they are told not to
_SANITIZER_SECONDS = 180


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for gpu-check.json and gpu-check.md")
    parser.add_argument("--rounds", type=int, default=25, help="how often each side of a benchmark is timed")
    parser.add_argument("--command", default="python -m benchmarks.gpu_check", help="what the result was made with")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(f"gpu-check: torch {torch.__version__} ({built}) finds no NVIDIA GPU here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tests = run_tests(Path(folder))
        sanitizer = run_sanitizer()
        status, measured = run_benchmarks(Path(folder), arguments.rounds)
    about = machine("cuda", arguments.command)
    write(arguments.out, about, tests, sanitizer, measured)
    return int(bool(tests["failed"] or not tests["passed"] or sanitizer["result"] == "failed" or status))


def run_tests(folder: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and each failure's last line."""
    xml = folder / "tests.xml"
    pytest("tests/gpu", "-m", "gpu", "-q", f"--junitxml={xml}")
    cases = list(ElementTree.parse(xml).iter("testcase")) if xml.exists() else []
    bad = [(case, failure) for case in cases for kind in ("failure", "error") for failure in case.findall(kind)]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = {f"{case.get('classname')}::{case.get('name')}": failure.get("message", "") for case, failure in bad}
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }


def run_sanitizer() -> dict[str, str]:
    """`result`: "passed", "failed" or "absent"; `detail`: what was run and what it said at the end."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"result": "absent", "detail": "there is no compute-sanitizer on PATH"}
    tests = [sys.executable, "-m", "pytest", *SANITIZED, "-q", "-p", "no:cacheprovider"]
    command = [program, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "66", *tests]
    # torch's allocator hides what is written beyond a tensor's end within its blocks.
    environment = {**os.environ, **COMPILED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"result": "failed", "detail": f"memcheck took more than {_SANITIZER_SECONDS} s"}
    said = [line for line in done.stdout.splitlines() if any(w in line for w in (" passed", " failed", "SUMMARY"))]
    detail = "; ".join(["memcheck", " ".join(SANITIZED), *said[-2:], f"exit status {done.returncode}"])
    return {"result": "failed" if done.returncode else "passed", "detail": detail}


def run_benchmarks(folder: Path, rounds: int) -> tuple[int, list[rows.Row]]:
    """pytest's exit status, and the rows of what could be measured."""
    flags = ("--benchmark-only", "--benchmark-quiet", "-q", "--device", "cuda", "--rounds", str(rounds))
    status = pytest("benchmarks", *flags, "--out", str(folder))
    result = folder / "bench.json"
    return status, rows.load(result)["rows"] if result.exists() else []


def pytest(*arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **COMPILED}).returncode


def write(
    out: Path, about: dict[str, Any], tests: dict[str, Any], sanitizer: dict[str, str], measured: list[rows.Row]
) -> None:
    rows.save(out / "gpu-check.json", about, measured, tests=tests, sanitizer=sanitizer)
    (out / "gpu-check.md").write_text(page(about, tests, sanitizer, measured) + "\n", encoding="utf-8")
    print(f"{out / 'gpu-check.json'} and {out / 'gpu-check.md'}")


def page(about: dict[str, Any], tests: dict[str, Any], sanitizer: dict[str, str], measured: list[rows.Row]) -> str:
    """The Markdown page: the machine, the tests, the tables."""
    names = ("gpu", "driver", "cuda", "torch", "triton", "python", "cpu", "diffkern", "commit", "command")
    lines = [f"- {name}: {about.get(name) or 'unknown'}" for name in names]
    lines += ["", f"Tests on the GPU: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."]
    lines += [f"- {name}: {' '.join(message.split())}" for name, message in tests["failures"].items()]
    lines += ["", f"compute-sanitizer: {sanitizer['result']} ({sanitizer['detail']})."]
    return "\n".join([*lines, "", report.tables(measured)])


if __name__ == "__main__":
    sys.exit(main())
