"""What a figure means nothing without: the machine, the versions, the commit."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffkern import __version__, backends

ROOT = Path(__file__).resolve().parent.parent


def machine(device: str, command: str) -> dict[str, Any]:
    """`command` is what the reader would type to measure the same."""
    found = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": None if backends.unavailable("native") else backends.native_module().isa,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "diffkern": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "command": command,
    }
    return found | gpu() if device == "cuda" else found


def gpu() -> dict[str, Any]:
    """The GPU in use and the software under it; None for what cannot be found out."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@functools.cache
def commit() -> str | None:
    """The checkout's commit, with "+" behind it if tracked files were changed since; None outside a git checkout."""
    head = _first_line("git", "rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _first_line("git", "status", "--porcelain", "--untracked-files=no") else "")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """None if the program is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
