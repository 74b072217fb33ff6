"""The build: setup.py does not need torch, and a machine without a compiler gets the reference with the reason."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def imported_names() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_setup_does_not_import_torch():
    """One build then serves any torch, and isolated builds need not download it."""
    assert not {name for name in imported_names() if name.split(".")[0] in ("torch", "numpy", "diffkern")}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requires = text.split("requires = [")[1].split("]")[0]
    assert "torch" not in requires


def test_cmake_does_not_ask_for_torch_or_this_very_machine():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "torch" not in text.lower()
    assert "-march=native" not in text


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["compiler", "cmake"])
def test_installing_without_a_compiler_succeeds_and_says_why(missing, tmp_path):
    """From a copy of the sources, so that neither a cached build nor this checkout's module is touched."""
    source, target, empty = tmp_path / "source", tmp_path / "target", tmp_path / "bin"
    empty.mkdir()
    tracked = ["setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "diffkern"]
    source.mkdir()
    for name in tracked:
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    for stale in [*source.glob("diffkern/_cpu*.so"), *source.glob("diffkern/_build_failure.txt")]:
        stale.unlink()
    if not (source / "README.md").exists():
        (source / "README.md").write_text("diffkern\n")

    environment = {k: v for k, v in os.environ.items() if not k.startswith("DIFFKERN_")}
    if missing == "compiler":
        environment |= {"CXX": "/bin/false", "CC": "/bin/false"}
    else:
        environment["PATH"] = str(empty)
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*install, "--target", str(target), str(source)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(target.glob("diffkern/_cpu*"))

    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]  # of this checkout
import torch, diffkern
from diffkern import backends
from diffkern.ops import group_norm
assert diffkern.__file__.startswith({str(target)!r}), diffkern.__file__
group_norm(torch.ones(1, 4, 2), 2)
print(backends.explain("group_norm"))
"""
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PATH": os.environ["PATH"], "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.startswith("group_norm: reference; not native: the native build failed when diffkern was installed: ")
    assert ("cmake" if missing == "cmake" else "compiler") in told.lower()


@pytest.mark.slow
def test_a_required_native_build_that_fails_is_an_error(tmp_path):
    """DIFFKERN_REQUIRE_NATIVE=1, for continuous integration and for wheels."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "csrc", "diffkern"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    (source / "README.md").write_text("diffkern\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "b", "--build-temp", "t"],
        env={**os.environ, "CXX": "/bin/false", "DIFFKERN_REQUIRE_NATIVE": "1"},
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "error" in done.stderr.lower()
