"""`make aot`: the Triton kernels compiled without a GPU, and what ptxas says of them.

Registers a thread, bytes of stack a thread and of shared memory a block (as a launch asks for; more than the GPU allows
a block would be refused), and instructions an element beside the budget: how many an H200 can issue in the time in
which its memory moves the element's bytes (132 multiprocessors · 128 lanes · 1.75 GHz / 4.3 TB/s: 6.9 a byte). A kernel
that is within it is bound by memory. The count is of the whole program text, so a loop counts once: kernels that loop
have no figure.

A launch is noted with `diffkern.ops._triton.launch.recorded` and compiled as Triton's launcher would: pointers and
sizes that are multiples of 16 are promised to be, ones and absent arguments become constants. Needs a process in which
TRITON_INTERPRET is not set. Compiled kernels stay in Triton's cache, which knows them by the hash of their source.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.ahead_of_time_cases import Case, cases
from diffkern import backends
from diffkern.ops._triton.launch import INTERPRETED, Launch, recorded, shared_memory

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 100)
BUDGET_A_BYTE = 132 * 128 * 1.75e9 / 4.3e12  # instructions of one lane
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# Instructions on float64, and why they are there.
FLOAT64 = {"F2F.F32.F64": "tables are float64, rounded to float32 after the gather, once a program"}
# Kernels that compute in float64, and why.
FLOAT64_OF = {
    "diffusion_loss_kernel": "a sample's segments are joined, and its weight applied, in float64: a handful of numbers",
    "vb_terms_kernel": "the same, and a sample's coefficients are products of float64 tables",
    "dynamic_threshold_kernel": "the interpolation between two values is in float64, once a sample",
    "guidance_rescale_kernel": "deviations are promised beside any mean, which takes float64 for every element",
}
# Bytes of stack a thread that a kernel may have in some configuration: with 128 registers two programs of eight warps
# share a multiprocessor, and a few values passed from register to stack and back cost less than that. In the main
# configurations for sm_90 none has any; of the norms the most, 80, is what sm_100's compiler makes of one with scale
# and shift.
SPILLS = {
    "attention_kernel": 16,
    "attention_key_gradients_kernel": 16,
    "attention_query_gradients_kernel": 16,
    "channel_rms_norm_kernel": 8,
    "channel_rms_norm_backward_kernel": 40,
    "diffusion_loss_kernel": 8,
    "dynamic_threshold_kernel": 8,
    "group_norm_kernel": 24,
    "group_norm_backward_kernel": 80,
    "vb_terms_kernel": 24,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers a thread, bytes of stack a thread and of shared memory a block, and SASS."""

    registers: int
    stack: int
    shared: int
    sass: str

    @property
    def opcodes(self) -> list[str]:
        return [op for _, op, _ in self._instructions() if op != "NOP"]

    @property
    def float64(self) -> list[str]:
        """The kinds of instructions on float64, moves and loads of 64 bits apart."""
        double = r"D(ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.\w+64H|(F2F|I2F|F2I)\b.*F64"
        return sorted({op for op in self.opcodes if re.match(double, op)})

    @property
    def loops(self) -> bool:
        """Whether it branches back, so that instructions run more often than they stand there."""
        targets = [
            (address, re.search(r"0x([0-9a-f]+)", rest)) for address, op, rest in self._instructions() if op == "BRA"
        ]
        return any(target and int(target[1], 16) < address for address, target in targets)

    def _instructions(self) -> list[tuple[int, str, str]]:
        found = re.findall(
            r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", self.sass, re.MULTILINE
        )
        return [(int(address, 16), op, rest) for address, op, rest in found]


def noted(case: Case, capability: int = 90) -> list[Launch]:
    """The launches that a call would make on a GPU of a compute capability, e.g. 90 for sm_90."""
    with (
        mock.patch.object(backends, "_load_triton", return_value=None),
        backends.use_backend("triton"),
        recorded(capability) as launches,
    ):
        try:
            case.call()
        except RuntimeError as error:  # of the backend that is asked for: such a GPU leaves this one to the reference
            if "shared memory" not in str(error):
                raise
    return launches


def specialised(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(types, constants, attributes) of the launch's arguments, as Triton's launcher makes them."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(parameter: Any, value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            return tuple(kind(parameter, each, (*path, i)) for i, each in enumerate(value))
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if special and isinstance(address, int) and address % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return parameter.annotation_type or _type(value)

    for position, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = kind(parameter, launch.arguments[parameter.name], (position,))
    return signature, constants, attributes


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"an argument of type {type(value).__name__} cannot be launched with")


def compiled(launch: Launch, capability: int = 90) -> Resources:
    """Compiles a noted launch for a compute capability."""
    source = ASTSource(launch.kernel, *specialised(launch))
    options = {"num_warps": launch.num_warps, "maxnreg": launch.registers}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _resources(binary.asm["cubin"], binary.metadata.shared)


def _resources(cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "-sass", file.name)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"], shared, sass)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


class Work:
    """Each different kernel of some cases for each compute capability, with the first case that launches it."""

    def __init__(self, main_only: bool, capabilities: Sequence[int] = CAPABILITIES) -> None:
        self.launches: list[tuple[Case, Launch, int]] = []
        seen = set()
        for capability, case in itertools.product(capabilities, cases()):
            if main_only and not case.main:
                continue
            for launch in noted(case, capability):
                kernel = (launch.kernel.__name__, launch.num_warps, launch.registers, repr(specialised(launch)))
                if (capability, kernel) not in seen:
                    seen.add((capability, kernel))
                    self.launches.append((case, launch, capability))

    def rows(self) -> list[Row]:
        """Compiled on all cores."""
        global _work
        _work = self
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            return pool.map(_row, range(len(self.launches)), chunksize=1)


_work: Work


def _row(index: int) -> Row:
    case, launch, capability = _work.launches[index]
    found = compiled(launch, capability)
    elements = next(v for v in launch.arguments.values() if isinstance(v, Tensor)).numel()
    per_element = launch.grid * launch.num_warps * 32 * len(found.opcodes) / elements
    return {
        "kernel": launch.kernel.__name__,
        "case": f"{case.op}, {case.name}",
        "capability": capability,
        "num_warps": launch.num_warps,
        "programs": launch.grid,
        "registers": found.registers,
        "stack": found.stack,
        "shared": found.shared,
        "instructions": len(found.opcodes),
        "instructions_per_element": None if found.loops else round(per_element, 1),
        "budget_per_element": round(BUDGET_A_BYTE * case.bytes_per_element, 1),
        "float64": found.float64,
    }


def problems(rows: Sequence[Row]) -> Iterator[str]:
    """What is wrong with compiled kernels, a line each."""
    for row in rows:
        where = f"{row['kernel']} (sm_{row['capability']}; {row['case']})"
        if row["stack"] > SPILLS.get(row["kernel"], 0):
            yield f"{where}: {row['stack']} bytes of stack a thread"
        allowed = shared_memory(row["capability"])
        if row["shared"] > allowed:
            yield f"{where}: {row['shared']} bytes of shared memory a block, of {allowed}"
        for kind in row["float64"]:
            if kind not in FLOAT64 and row["kernel"] not in FLOAT64_OF:
                yield f"{where}: {kind}, an instruction on float64 without a reason"


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    head = ["kernel", "case", "warps", "registers", "stack", "shared", "instructions", "an element", "budget"]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|--:" * (len(head) - 2) + "|"]
    for row in rows:
        each = row["instructions_per_element"]
        cells = [row[k] for k in ("kernel", "case", "num_warps", "registers", "stack", "shared", "instructions")]
        cells += ["loops" if each is None else each, row["budget_per_element"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def save(rows: Sequence[Row], out: Path, main_only: bool) -> None:
    """A JSON file and a page for each compute capability."""
    out.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.ahead_of_time" + (" --main" if main_only else "")
    for capability in sorted({row["capability"] for row in rows}):
        own = [row for row in rows if row["capability"] == capability]
        about = {"triton": triton.__version__, "target": f"sm_{capability}", "command": command}
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in own)
        text = json.dumps(about)[:-1] + f', "rows": [\n{lines}\n]}}\n'
        (out / f"sm_{capability}.json").write_text(text, encoding="utf-8")
        page = f"Triton {triton.__version__}, sm_{capability}, `{command}`\n\n{table(own)}\n"
        (out / f"sm_{capability}.md").write_text(page, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--main", action="store_true", help="the main configurations only, which the tests compile")
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES), metavar="90")
    parser.add_argument("--out", type=Path, default=Path("out/ahead-of-time"), help="folder for the tables")
    arguments = parser.parse_args()
    if INTERPRETED:
        print("ahead_of_time: TRITON_INTERPRET is set, and what is interpreted is not compiled", file=sys.stderr)
        return 2
    found = Work(arguments.main, arguments.capabilities).rows()
    save(found, arguments.out, arguments.main)
    wrong = list(problems(found))
    print("\n".join([*wrong, f"{len(found)} kernels compiled, {len(wrong)} problems; tables in {arguments.out}"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
