"""Builds the native module with CMake; never imports torch.

Without a compiler, CMake or Python's headers the package still installs: the failure is caught here (setuptools'
`optional=True` does not cover a build that CMake drives) and its reason is written beside the package, where
`diffkern info` reads it. Everything else about the package is in pyproject.toml.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILURE_FILE = "_build_failure.txt"


class CMakeBuild(build_ext):
    """Configures and builds the `_cpu` target into the place where setuptools expects the extension."""

    def run(self) -> None:
        if os.environ.get("DIFFKERN_SKIP_NATIVE") == "1":
            self.extensions = []
            return
        failure = self.package_folder() / FAILURE_FILE
        failure.unlink(missing_ok=True)
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError, RuntimeError, ImportError) as error:
            if os.environ.get("DIFFKERN_REQUIRE_NATIVE") == "1":
                raise
            reason = f"the native build failed when diffkern was installed: {describe(error)}"
            for stale in self.package_folder().glob("_cpu*.so"):
                stale.unlink()
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(reason + "\n")
            print(f"diffkern: {reason}\ndiffkern: installed without it; the reference backend is used", file=sys.stderr)
            self.extensions = []  # nothing to copy or to list

    def package_folder(self) -> Path:
        """Where the package is imported from afterwards: the sources if editable, else what goes into the wheel."""
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib)) / "diffkern"

    def build_extension(self, ext: Extension) -> None:
        self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve())

    def run_cmake(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *os.environ.get("DIFFKERN_CMAKE_ARGS", "").split(),
        ]
        if not (build / "CMakeCache.txt").exists() and has_ninja():
            configure += ["-G", "Ninja"]
        run(configure)
        run(["cmake", "--build", str(build), "--target", "_cpu", "--parallel", str(os.cpu_count() or 1)])
        if not target.exists():
            raise RuntimeError(f"CMake built no {target.name}: it found the headers of another Python")


def run(command: list[str]) -> None:
    """Runs a command; on failure its output is part of the error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)


def describe(error: Exception) -> str:
    """One line that tells a user what was missing."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in (error.output or "").splitlines() if line.strip()]
        marked = [i for i, line in enumerate(lines) if "error" in line.lower()]
        told = lines[marked[0] : marked[0] + 4] if marked else lines[-2:]
        return f"{' '.join(error.cmd[:2])} …: {' '.join(told)}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was not found"
    return f"{type(error).__name__}: {error}"


def has_ninja() -> bool:
    try:
        return subprocess.run(["ninja", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


setup(ext_modules=[Extension("diffkern._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
