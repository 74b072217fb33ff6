"""Networks of other codebases as they are and fused, one evaluation and one training step.

`python -m benchmarks.fusion --out out/fusion` times each network unfused and with several sets of options, interleaved
in one process on as many threads as PyTorch uses, after checking that they agree, and writes fusion.json and fusion.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffkern
from benchmarks.machine import machine
from benchmarks.networks import CASES, Case, output
from benchmarks.timing import interleave

OPTIONS: dict[str, dict[str, bool]] = {
    "fused": {},
    "channels_last": {"channels_last": True},
    "fold_upsample": {"fold_upsample": True},
    "channels_last, fold_upsample": {"channels_last": True, "fold_upsample": True},
    "all": {"channels_last": True, "fold_upsample": True, "virtual_concat": True},
}
TOLERANCE = 2e-5


def measure(case: Case, mode: str, rounds: int | None) -> list[dict[str, Any]]:
    """One row for each set of options: milliseconds before and after, and their ratio."""
    torch.manual_seed(0)
    network = case.network().train(mode == "train")
    randomise(network)
    arguments = case.arguments()
    variants: dict[str, nn.Module] = {"unfused": network}
    for name, options in OPTIONS.items():
        variants[name] = copy.deepcopy(network)
        diffkern.fuse(variants[name], **options)
    step: Callable[[nn.Module], Callable[[], Any]]
    step = (lambda m: training_step(m, arguments)) if mode == "train" else (lambda m: evaluation(m, arguments))
    errors = {name: difference(network, fused, arguments) for name, fused in variants.items() if name != "unfused"}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise AssertionError(f"{case.what}: the outputs differ by {wrong} of the largest value")
    rounds = rounds or (case.rounds if mode == "eval" else case.rounds // 2)
    times = interleave({name: step(m) for name, m in variants.items()}, rounds=rounds, warmup=1)
    before = times["unfused"]
    return [
        {
            "case": case.what,
            "mode": mode,
            "options": name,
            "unfused_ms": milliseconds(before),
            "fused_ms": milliseconds(times[name]),
            "ratio": round(before.p50 / times[name].p50, 3),
            "difference": float(f"{errors[name]:.2g}"),
        }
        for name in OPTIONS
    ]


def randomise(network: nn.Module) -> None:
    """Give what starts at zero some values, or half of the network would do nothing."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)


def difference(unfused: nn.Module, fused: nn.Module, arguments: tuple[Any, ...]) -> float:
    """max|after − before| / max|before| of an evaluation, with the same random numbers."""
    found = []
    with torch.no_grad():
        for network in (unfused, fused):
            torch.manual_seed(0)
            found.append(output(network, arguments))
    return float((found[1] - found[0]).abs().max() / found[0].abs().max())


def evaluation(network: nn.Module, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return output(network, arguments)

    return run


def training_step(network: nn.Module, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """Forward, backward and Adam, which is the same for all."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)

    def run() -> None:
        optimizer.zero_grad()
        output(network, arguments).square().mean().backward()
        optimizer.step()

    return run


def milliseconds(timing: Any) -> list[float]:
    return [round(1e3 * seconds, 2) for seconds in (timing.p20, timing.p50, timing.p80)]


def table(rows: list[Mapping[str, Any]]) -> str:
    lines = ["| network | | options | unfused ms | fused ms (p20–p80) | ratio |", "|---|---|---|--:|--:|--:|"]
    for row in rows:
        low, middle, high = row["fused_ms"]
        lines.append(
            f"| {row['case']} | {row['mode']} | {row['options']} | {row['unfused_ms'][1]:.0f} "
            f"| {middle:.0f} ({low:.0f}–{high:.0f}) | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--modes", nargs="+", choices=("eval", "train"), default=["eval", "train"])
    parser.add_argument(
        "--rounds", type=int, help="rounds of each; unless given the case's own, half as many in training"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/fusion"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        for mode in arguments.modes:
            measured = measure(CASES[name], mode, arguments.rounds)
            print(table(measured), flush=True)
            rows += measured
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.fusion", *sys.argv[1:]])
    report = {"machine": machine("cpu", command), "rows": rows}
    (arguments.out / "fusion.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "fusion.md").write_text(table(rows))
    print(arguments.out / "fusion.json")


if __name__ == "__main__":
    main()
