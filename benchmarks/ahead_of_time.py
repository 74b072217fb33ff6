"""Triton kernels compiled without a GPU, and what ptxas says of them: registers, stack, shared memory, instructions.

A launch is noted with `diffkern.ops._triton.launch.recorded` and compiled as Triton's launcher would: pointers and
sizes that are multiples of 16 are promised to be, ones and absent arguments become constants. Needs a process in which
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffkern.ops._triton.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers a thread, bytes of stack a thread and of shared memory a block, and SASS."""

    registers: int
    stack: int
    shared: int
    sass: str

    @property
    def instructions(self) -> int:
        """All of the kernel's, but for the padding after its end."""
        return len([op for op in self.opcodes if not op.startswith("NOP")])

    @property
    def opcodes(self) -> list[str]:
        return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", self.sass, re.MULTILINE)

    @property
    def float64(self) -> list[str]:
        """Instructions on float64, moves and loads of 64 bits apart."""
        doubles = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "MUFU.RCP64H", "MUFU.RSQ64H")
        return [op for op in self.opcodes if op.startswith(doubles) or re.match(r"(F2F|I2F|F2I).*F64", op)]


def compiled(launch: Launch, capability: int = 90) -> Resources:
    """Compiles a noted launch for a compute capability, e.g. 90 for sm_90."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    parameters = launch.kernel.params
    for position, parameter in enumerate(parameters):
        value = launch.arguments.get(parameter.name)
        kind, constant, divisible = _argument(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if constant:
            constants[(position,)] = value
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": 3, "maxnreg": launch.registers}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _resources(binary.asm["cubin"])


def _argument(value: Any, is_constexpr: bool) -> tuple[str, bool, bool]:
    """(type, whether it is a constant, whether it is a multiple of 16) of an argument, as the launcher sees it."""
    if is_constexpr or value is None or (type(value) is int and value == 1):
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], False, value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False, False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", False, value % 16 == 0
    if isinstance(value, float):
        return "fp32", False, False
    raise TypeError(f"an argument of type {type(value).__name__} cannot be launched with")


def _resources(cubin: bytes) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"], found["SHARED"], sass)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
