"""``diffkern info``: what is installed, what the machine has, and which backend each op takes."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
import tyro
from rich.console import Console
from rich.table import Table

import diffkern
from diffkern import backends
from diffkern.ops._registry import OPS

_PACKAGES = ("torch", "triton", "numpy", "accelerate", "safetensors", "pillow", "scikit-learn", "tyro")


@dataclass(frozen=True)
class InfoCommand:
    """Show versions, devices and threads, and for each op the backend it takes and why not the others."""


def run(arguments: list[str]) -> None:
    tyro.cli(InfoCommand, prog="diffkern info", args=arguments)
    console = Console()
    for title, rows in (("Versions", _versions()), ("Machine", _machine()), ("Backends", _backends())):
        console.print(_table(title, rows))
    console.print(_table("Ops", [_op(name) for name in sorted(OPS)], "op", "backend", "why not another"))


def _table(title: str, rows: Sequence[tuple[str, ...]], *header: str) -> Table:
    table = Table(*header, title=title, title_justify="left", show_header=bool(header))
    for row in rows:
        table.add_row(*row)
    return table


def _versions() -> list[tuple[str, str]]:
    found = [("diffkern", diffkern.__version__), ("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def _machine() -> list[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", f"{os.cpu_count()} cores, {capability}, {torch.get_num_threads()} threads in torch"),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 20} MiB")
        )
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        rows.append(("GPU", f"none that torch can use ({built})"))
    rows += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("DIFFKERN_")]
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = []
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        detail = f", {backends.native_module().isa}" if name == "native" and not reason else ""
        rows.append((name, f"unavailable: {reason}" if reason else f"available{detail}"))
    return rows


def _op(name: str) -> tuple[str, ...]:
    """ "group_norm: native; not triton: …" in three columns."""
    choice, _, rest = backends.explain(name).removeprefix(f"{name}: ").partition("; ")
    return name, choice, rest
