"""The host's side of a launch: what can be launched here, on how many multiprocessors, and who looks on."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from diffkern import backends
from diffkern.ops._noise import capturing
from diffkern.ops._triton import autotune

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
if INTERPRETED:
    from diffkern.ops._triton import interpreter

    interpreter.mend()

_H200_MULTIPROCESSORS = 132
_H200_CAPABILITY = 90


class Launch(NamedTuple):
    """A kernel and what it would have been launched with."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int
    registers: int | None = None


_recorder: list[Launch] | None = None
_recorded_for = _H200_CAPABILITY


@contextmanager
def recorded(capability: int = _H200_CAPABILITY) -> Iterator[list[Launch]]:
    """Inside the block launches are noted instead of made, for tensors on any device: what to compile ahead of time.

    capability: of the GPU that they are meant for, e.g. 90 for sm_90.
    """
    global _recorder, _recorded_for
    previous = _recorder, _recorded_for
    launches: list[Launch] = []
    _recorder, _recorded_for = launches, capability
    try:
        yield launches
    finally:
        _recorder, _recorded_for = previous


def launch(
    kernel: Any,
    grid: int,
    device: torch.device,
    *,
    num_warps: int = 4,
    registers: int | None = None,
    repeatable: bool = True,
    **arguments: Any,
) -> None:
    """Runs `grid` programs of the kernel on the device's current stream; no programs, no launch.

    registers: the most that a thread may have, so that more programs share a multiprocessor. repeatable: whether it
    does the same when run again, so that autotuning may.
    """
    if grid == 0:
        return
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, num_warps, registers))
        return

    def run(warps: Warps) -> None:
        # By position: Triton takes a keyword called `stream` for an option of its own.
        values = [arguments[name] for name in kernel.arg_names]
        kernel[(grid,)](*values, num_warps=warps.num_warps, maxnreg=warps.registers)

    with _current(device):
        warps = Warps(num_warps, registers)
        if repeatable and autotune.enabled():
            warps = autotune.tuned(kernel.__name__, _key(arguments), others(warps), warps, run, device)
        run(warps)


@dataclass(frozen=True)
class Warps:
    """num_warps: of a program. registers: the most of a thread, or None for as many as it takes."""

    num_warps: int
    registers: int | None


def others(warps: Warps) -> list[Warps]:
    """What autotuning tries beside a choice: half and twice as many warps, which changes the order of sums at most."""
    return [Warps(n, None) for n in (warps.num_warps // 2, warps.num_warps * 2) if 1 <= n <= 32]


_OF_A_CALL = ("seed", "draw", "call", "stream")  # numbers that say nothing of the work


def _key(arguments: dict[str, Any]) -> list[object]:
    """What may make another choice the fastest: sizes, strides, what is compiled in, and dtypes."""
    return [
        str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else f"{name}={value}"
        for name, value in sorted(arguments.items())
        if isinstance(value, Tensor) or (_whole(value) and name not in _OF_A_CALL)
    ]


def _whole(value: object) -> bool:
    """Whether it is an int or, as strides are, a tuple of them."""
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(each, int) for each in value))


def _current(device: torch.device) -> Any:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_tickets: dict[torch.device, Tensor] = {}


def tickets(samples: int, device: torch.device) -> Tensor:
    """int32 zeros, `samples` or more, for the programs of a sample to draw from; the kernel leaves zeros behind.

    One tensor is kept for the default stream, on which kernels follow each other. Calls on other streams, and graphs
    being captured, get their own: what is made there may lie in a graph's memory, which must not be kept.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if stream or capturing(device):
        return torch.zeros(samples, dtype=torch.int32, device=device)
    kept = _tickets.get(device)
    if kept is None or kept.shape[0] < samples:
        kept = _tickets[device] = torch.zeros(max(samples, 1024), dtype=torch.int32, device=device)
    return kept


def unsupported(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take this tensor, or None."""
    if x.dtype == torch.float64:
        return "float64 is the reference's"
    return unsupported_device(x)


def unsupported_device(x: Tensor) -> str | None:
    if _recorder is not None:
        return None
    if INTERPRETED:
        if backends.forced_backend() != "triton":
            return "the interpreter runs only where it is asked for"
        if x.device.type != "cpu":
            return f"the interpreter is for CPU tensors, this one is on {x.device}"
    elif x.device.type != "cuda":
        return f"the Triton kernels are for CUDA tensors, this one is on {x.device}"
    elif torch.version.hip is not None or _capability(x.device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or more"
    return None if x.data_ptr() or not x.numel() else "the tensor has no memory of its own"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; an H200's where nothing is launched on a GPU."""
    if device.type != "cuda":
        return _H200_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """The device's compute capability, e.g. 90 for sm_90; an H200's where nothing is launched on a GPU."""
    if _recorder is not None or device.type != "cuda":
        return _recorded_for
    major, minor = _capability(device)
    return 10 * major + minor


def has_warp_groups(device: torch.device) -> bool:
    """Whether its tensor cores multiply for whole groups of four warps: those of sm_90 to sm_11x, not of sm_120."""
    return 90 <= capability(device) < 120


def shared_memory(capability: int) -> int:
    """Bytes that a block may have at the most, on GPUs of a compute capability (CUDA C++ Programming Guide)."""
    if capability in (80, 87):
        return 163 * 1024
    return (227 if 90 <= capability < 120 else 99) * 1024


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(n)
