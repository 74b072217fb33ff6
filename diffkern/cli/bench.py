"""``diffkern bench``: the benchmarks of the checkout that diffkern is imported from."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

_CHECKOUT = Path(__file__).resolve().parents[2]
_NOTHING_COLLECTED = 5  # pytest's exit status


@dataclass(frozen=True)
class BenchCommand:
    """Time every op against eager PyTorch, torch.compile and diffusers, each result checked first.

    Writes OUT/bench.json, OUT/bench.md and, unless --no-plots, OUT/roofline.png and OUT/ratios.png.
    """

    out: Path = Path("out")
    """Folder of the results."""
    compare: Path | None = None
    """A bench.json of an earlier run: shows for each row whether diffkern has become slower. Changes no exit status."""
    filter: str = ""
    """Which benchmarks, as pytest -k takes it: "group_norm and not compiled"."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the tensors are."""
    rounds: int = 25
    """How often each side is timed."""
    plots: bool = True
    """Draw the pictures, which needs matplotlib."""


def run(arguments: list[str]) -> None:
    command = tyro.cli(BenchCommand, prog="diffkern bench", args=arguments)
    if command.rounds < 1:
        raise ValueError(f"--rounds {command.rounds}: it must be 1 or more")
    if not (_CHECKOUT / "benchmarks" / "conftest.py").exists():
        raise FileNotFoundError(
            "the benchmarks are not in the installed package: run `make bench` in a checkout of diffkern's sources"
        )
    sys.path.insert(0, str(_CHECKOUT))  # the checkout's root is importable only where it is the working directory
    from benchmarks import plots, report, rows

    out = command.out.resolve()
    result = out / "bench.json"
    # Read before the run, which may write the same file.
    earlier = rows.load(command.compare)["rows"] if command.compare else None
    status = _measure(command, out, arguments)
    if status == _NOTHING_COLLECTED:
        raise ValueError(f"--filter {command.filter!r}: it matches no benchmark")
    if not result.exists():
        raise ValueError(f"pytest ended with status {status} before anything was measured")
    found = rows.load(result)
    print(f"\n{result} and {out / 'bench.md'}")
    if command.plots:
        print(*plots.draw(out, found["machine"], found["rows"]), sep=" and ")
    if earlier is not None:
        print(f"\n{report.comparison(earlier, found['rows'])}")
    if status:
        raise ValueError("a benchmark failed before it was timed: its output stands above")


def _measure(command: BenchCommand, out: Path, arguments: list[str]) -> int:
    """Runs pytest in a process of its own, so that nothing of this one is in the figures; returns its status."""
    (out / "bench.json").unlink(missing_ok=True)  # what is there afterwards is of this run
    flags = [
        *("--benchmark-only", "--benchmark-quiet", "-q", "-p", "no:cacheprovider"),
        *("--device", command.device, "--rounds", str(command.rounds), "--out", str(out)),
        *("--command", " ".join(["diffkern bench", *arguments])),
        *(("-k", command.filter) if command.filter else ()),
    ]
    return subprocess.run([sys.executable, "-m", "pytest", "benchmarks", *flags], cwd=_CHECKOUT).returncode
