"""Imports point down only, `import diffkern` is light, and nothing in csrc knows torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "diffkern"

# Which packages of diffkern each one may import at run time (itself aside); the map is the layering.
BELOW_OPS = {"backends", "_version"}
ALLOWED = {
    "backends": {"ops._registry"},  # explain alone, inside the function
    "ops": BELOW_OPS,
    "process": set(),
    "solvers": {"process"},
    "nn": {"ops", *BELOW_OPS},
    "models": {"nn", "ops", *BELOW_OPS},
    "sampling": {"models", "nn", "ops", "process", "solvers", *BELOW_OPS},
    "training": {"sampling", "models", "nn", "ops", "process", "solvers", *BELOW_OPS},
    "evaluation": {"sampling", "models", "nn", "ops", "process", "solvers", *BELOW_OPS},
    "integrations": {"sampling", "models", "nn", "ops", "process", "solvers", *BELOW_OPS},
}
NUMPY_ONLY = ("process", "solvers")


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports at run time; with `module_level` without what functions import later."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = [*path.relative_to(ROOT).with_suffix("").parts]
    for node in walk(tree, module_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def walk(node: ast.AST, module_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from walk(child, module_level)


def files(package: str) -> list[Path]:
    """A package's files, or the module of that name."""
    single = PACKAGE / f"{package}.py"
    return [single] if single.exists() else sorted((PACKAGE / package).rglob("*.py"))


def inside(name: str, package: str) -> bool:
    return name == f"diffkern.{package}" or name.startswith(f"diffkern.{package}.")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    for path in files(package):
        for name in imports(path):
            if name.startswith("diffkern.") and name != "diffkern._cpu":
                allowed = any(inside(name, below) for below in {package, *ALLOWED[package]})
                assert allowed or name == "diffkern.backends", f"{path.relative_to(ROOT)} imports {name}"


def test_every_package_is_in_the_map():
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages - {"cli"} <= set(ALLOWED)


@pytest.mark.parametrize("package", NUMPY_ONLY)
def test_the_mathematics_know_numpy_alone(package):
    for path in files(package):
        for name in imports(path, module_level=True):
            assert not re.match(r"(torch|triton|scipy)\b", name), f"{path.relative_to(ROOT)} imports {name}"


def test_no_backend_imports_another():
    kinds = {"native", "triton", "reference"}
    for path in (PACKAGE / "ops").rglob("*.py"):
        if path.stem not in kinds:
            continue
        for name in imports(path):
            if name.startswith("diffkern.ops."):
                # The reference of one op may be written with that of another: noise in q_sample, words in the normals.
                others = (kinds - {path.stem}) & set(name.split("."))
                assert not others, f"{path.relative_to(ROOT)} imports {name}"


def test_only_backends_loads_the_native_module():
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "backends.py":
            assert not any(re.search(r"\b_(cpu|cuda)$", name) for name in imports(path)), path


def test_optional_packages_are_imported_late():
    """At module level the library needs torch and numpy only; Triton's kernels, and schedulers for diffusers, more."""
    optional = r"(tyro|rich|tqdm|matplotlib|accelerate|diffusers|sklearn|triton|PIL|safetensors|pybind11)\b"
    for package in ALLOWED:
        for path in files(package):
            for name in imports(path, module_level=True):
                of_its_codebase = "diffusers" in (path.parent.name, path.stem.partition("_")[0])
                of_its_codebase = of_its_codebase and name.startswith("diffusers.")
                kernel = "triton" in path.stem or path.parent.name == "_triton"
                if kernel and name.split(".")[0] == "triton":
                    continue
                assert of_its_codebase or not re.match(optional, name), f"{path.relative_to(ROOT)} imports {name}"


HEAVY = ["triton", "tyro", "rich", "tqdm", "matplotlib", "accelerate", "diffusers", "sklearn", "safetensors", "PIL"]


def test_import_diffkern_is_light(run_python):
    """torch and numpy, nothing optional, no native module; and no other part of diffkern that was not asked for."""
    code = f"""
import sys
import torch, numpy
before = set(sys.modules)
import diffkern
loaded = set(sys.modules) - before
print(sorted(m for m in loaded if m.split(".")[0] in {HEAVY!r} or m in ("diffkern._cpu", "diffkern._cuda")))
print("diffkern._cpu" in sys.modules, torch.cuda.is_initialized())
"""
    assert run_python(code).splitlines() == ["[]", "False False"]


def test_import_of_the_ops_compiles_and_loads_nothing(run_python):
    code = """
import sys
import torch
before = set(sys.modules)
from diffkern.ops import diffusion_loss, dynamic_threshold, group_norm, philox_normal, q_sample, solver_step
loaded = set(sys.modules) - before
print("diffkern._cpu" in sys.modules, "triton" in loaded, "torch._dynamo" in loaded)
"""
    assert run_python(code) == "False False False"


def sources() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))


def test_nothing_in_csrc_knows_torch():
    for path in sources():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("#include"):
                assert not re.search(r"torch|ATen|c10|caffe2", line), f"{path.relative_to(ROOT)}: {line}"


def test_only_the_bindings_know_python():
    for path in sources():
        if path.parent.name != "bindings":
            for line in path.read_text(encoding="utf-8").splitlines():
                assert not re.search(r"#\s*include.*(pybind11|Python\.h)", line), f"{path.relative_to(ROOT)}: {line}"


def test_one_op_one_room():
    """Every op's folder holds its public function and its reference, and its kernel's C++ file has its name."""
    for folder in (PACKAGE / "ops").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert (folder / "op.py").exists(), folder
            assert (folder / "reference.py").exists(), folder
            if (folder / "native.py").exists():
                assert (ROOT / "csrc" / "cpu" / f"{folder.name}.cpp").exists(), folder


def test_no_file_names_a_place_of_the_machine_it_was_written_on():
    own = Path(__file__).name
    kinds = (".py", ".cpp", ".h", ".md", ".toml", ".txt")
    folders = ("diffkern", "csrc", "tests", "benchmarks", "docs")
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds and p.name != own):
        assert not re.search(r"(?<![\w.])/(home|root|work|Users)/", path.read_text(encoding="utf-8")), path
