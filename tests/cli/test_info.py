"""`diffkern info` says what is there and why something is not, also where little is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import diffkern
from diffkern import backends
from diffkern.cli import main
from diffkern.ops._registry import OPS
from tests.conftest import ROOT

HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from diffkern.cli import main
sys.exit(main(["info"]))
"""


def plain(run_python, *also_hidden: str, **environment: str) -> list[list[str]]:
    """The lines that a machine without rich, tyro and the packages named here shows, cell by cell."""
    text = run_python(HIDDEN.format(names=("rich", "tyro", *also_hidden)), **environment)
    return [line.strip().split("  ") for line in text.splitlines()]


def cells(lines: list[list[str]], name: str) -> list[str]:
    """The cells behind the first one of the line that begins with `name`."""
    return next([cell.strip() for cell in line[1:] if cell.strip()] for line in lines if line[0] == name)


def test_it_needs_neither_rich_nor_tyro(run_python):
    lines = plain(run_python)
    assert [line[0] for line in lines if line[0] in ("Versions", "Machine", "Backends", "Ops")] == [
        "Versions", "Machine", "Backends", "Ops",
    ]  # fmt: skip
    assert cells(lines, "diffkern") == [diffkern.__version__]
    assert cells(lines, "torch") == [torch.__version__]
    assert cells(lines, "triton")


@pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")
def test_it_names_compiler_and_instruction_sets(run_python):
    module = backends.native_module()
    assert module.isa in module.isas
    assert module.isas[0] == "portable"
    assert any(module.compiler.startswith(name) for name in ("GCC ", "Clang "))
    (told,) = cells(plain(run_python), "native")
    assert told == f"available: {module.isas[-1]} (of {', '.join(module.isas)}), built with {module.compiler}"
    (told,) = cells(plain(run_python, DIFFKERN_CPU="portable"), "native")
    assert told.startswith(f"available: portable (of {', '.join(module.isas)})")


@pytest.mark.skipif(backends.unavailable("native") is not None, reason="no native module")
def test_every_op_says_what_it_takes_and_why_no_other(run_python):
    lines = plain(run_python)
    for name in OPS:
        chosen, others = cells(lines, name)
        assert chosen == "native"
        assert others.startswith("reference: takes what native does not; triton: ")
        assert any(reason in others for reason in ("no CUDA device", "triton does not import", "takes what native"))


def test_without_the_native_module_the_reason_stands_there(run_python):
    lines = plain(run_python, "diffkern._cpu")
    assert cells(lines, "native")[0].startswith("unavailable: ")
    for name in OPS:
        assert any(reason.startswith("native: ") for reason in cells(lines, name)[1].split("; "))


def test_a_backend_that_was_asked_for(run_python):
    lines = plain(run_python, DIFFKERN_BACKEND="triton")
    assert cells(lines, "q_sample")[0] == "triton (asked for) cannot run"
    assert cells(lines, "DIFFKERN_BACKEND") == ["triton"]
    lines = plain(run_python, DIFFKERN_BACKEND="reference")
    assert cells(lines, "q_sample")[0] == "reference (asked for)"
    assert "native: reference was asked for" in cells(lines, "q_sample")[1]


def test_as_a_module_and_its_flags(capsys):
    done = subprocess.run([sys.executable, "-m", "diffkern", "info"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert diffkern.__version__ in done.stdout
    with pytest.raises(SystemExit) as wrong:
        main(["info", "--no-such-flag"])
    assert wrong.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err
