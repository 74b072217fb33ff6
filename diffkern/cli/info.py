"""``diffkern info``: what is installed, what the machine has, and which backend each op takes.

Needs torch and numpy alone, because it is where one looks when something is missing; with rich the tables have lines.
"""

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import metadata

import torch

import diffkern
from diffkern import backends
from diffkern.ops._registry import OPS, Op

_PACKAGES = ("numpy", "accelerate", "safetensors", "pillow", "scikit-learn", "diffusers", "matplotlib", "tyro", "rich")
Rows = Sequence[tuple[str, ...]]


def run(arguments: list[str]) -> None:
    about = "Show versions, devices and threads, and for each op the backend it takes and why not the others."
    argparse.ArgumentParser(prog="diffkern info", description=about).parse_args(arguments)
    ops = [_op(OPS[name]) for name in sorted(OPS)]
    for title, rows in (("Versions", _versions()), ("Machine", _machine()), ("Backends", _backends()), ("Ops", ops)):
        _print(title, rows)


def _print(title: str, rows: Rows) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(title)
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))  # a reason may hold brackets, which are no markup
    Console().print(table)


def _versions() -> Rows:
    found = [
        ("diffkern", diffkern.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton") or "not installed; torch's builds for CUDA bring it"),
    ]
    return [*found, *((name, _version(name) or "not installed") for name in _PACKAGES)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> Rows:
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", f"{os.cpu_count()} cores; {torch.get_num_threads()} threads and {capability} in torch"),
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


def _backends() -> Rows:
    return [(name, _backend(name)) for name in backends.NAMES]


def _backend(name: str) -> str:
    reason = backends.unavailable(name)
    if reason:
        return f"unavailable: {reason}"
    if name != "native":
        return "available"
    module = backends.native_module()
    return f"available: {module.isa} (of {', '.join(module.isas)}), built with {module.compiler}"


def _op(op: Op) -> tuple[str, str, str]:
    """The op, its backend on this machine, and each other one: why it cannot run, or that a call may still fall to it.

    The choice is made for each call: `diffkern.backends.explain(op, *args)` tells of one.
    """
    chosen, _, problem = backends.explain(op.name).removeprefix(f"{op.name}: ").partition(", which cannot run")
    name = chosen.partition(" ")[0].rstrip(";")
    others = [other for other in backends.NAMES if other != name]
    reasons = [f"{other}: {op.missing(other) or _standing(op, other, name)}" for other in others]
    mark = " (asked for)" if backends.forced_backend() else ""
    return op.name, f"{name}{mark}{' cannot run' if problem else ''}", "; ".join(reasons)


def _standing(op: Op, other: str, chosen: str) -> str:
    """Why a backend that is there is not the one chosen."""
    if backends.forced_backend():
        return f"{chosen} was asked for"
    return f"takes what {chosen} does not"
