"""The likelihood of digits under a learned noise schedule and under a learned variance, beside the usual ones.

`python -m benchmarks.learned_schedule --steps 5000 --out out/learned_schedule` trains the digits U-Net once for each
run, with the same seed, images, batches and number of steps, evaluates the bound on the held-out digits with the same
noise, and writes learned_schedule.json and learned_schedule.png. The linear run's network is evaluated with every
fixed Σ. Runs that --runs leaves out keep what an earlier report in the same folder says of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from diffkern.evaluation import NllResult, estimate_eps_mean_square, evaluate_nll
from diffkern.models import UNet, UNetConfig
from diffkern.process import GaussianProcess, linear_betas
from diffkern.training import Digits, LearnedSchedule, TrainConfig, Trainer

LEVELS = 17
TIMESTEPS = 1000
TRAIN = TrainConfig(steps=5000, batch_size=64, lr=1e-3, warmup_steps=100, ema_decay=0.998, label_dropout=0.1, seed=0)


@dataclass(frozen=True)
class Run:
    """One network: its process, and the training settings that are its own."""

    what: str
    process: Callable[[], GaussianProcess | LearnedSchedule]
    settings: dict[str, Any]
    variances: tuple[str, ...] = ()  # others that the same network is evaluated with


RUNS = {
    "linear": Run(
        "linear schedule, fixed Σ, simple loss",
        lambda: GaussianProcess(linear_betas(TIMESTEPS)),
        {},
        ("fixed_large", "analytic"),
    ),
    "linear_bound": Run(
        "linear schedule, fixed Σ, the bound as the loss",
        lambda: GaussianProcess(linear_betas(TIMESTEPS)),
        {"loss": "rescaled_kl"},
    ),
    "hybrid": Run(
        "linear schedule, learned-range Σ, hybrid loss",
        lambda: GaussianProcess(linear_betas(TIMESTEPS), variance="learned_range"),
        {"loss": "hybrid"},
    ),
    "learned": Run("learned schedule, fixed Σ", lambda: LearnedSchedule(TIMESTEPS), {}),
    "line": Run(
        "the same bound, schedule kept at its start: log SNR a straight line",
        lambda: LearnedSchedule(TIMESTEPS, lr_scale=0.0),
        {},
    ),
}


def train_and_evaluate(run: Run, steps: int, images: int | None) -> dict[str, Any]:
    """One row of the JSON; `images` held-out digits are evaluated, None being all 256."""
    process = run.process()
    torch.manual_seed(TRAIN.seed)
    config = replace(UNetConfig.digits(), learn_sigma=process.variance.startswith("learned"))
    model = UNet(config).to(memory_format=torch.channels_last)
    begin = time.perf_counter()
    result = Trainer(model, process, Digits("train"), replace(TRAIN, steps=steps, **run.settings)).fit()
    trained = time.perf_counter()
    row = evaluate(result.ema, result.process, images, run.what)
    others = {
        variance: evaluate(result.ema, with_variance(result.ema, result.process, variance, images), images, variance)
        for variance in run.variances
    }
    return {
        "what": run.what,
        **row,
        "variances": others,
        "train_seconds": trained - begin,
        "evaluate_seconds": time.perf_counter() - trained,
        "last_losses": float(np.mean(result.losses[-200:])),
    }


def evaluate(model: torch.nn.Module, process: GaussianProcess, images: int | None, what: str) -> dict[str, Any]:
    """The bound of the held-out digits and its parts."""
    data = first(Digits("heldout"), images)
    found = evaluate_nll(model, process, data, levels=LEVELS, batch_size=512, progress=True)
    row = summary(found, process)
    print(f"{what}: {row['bits_per_dim']:.3f} bits/dim ± {row['standard_error']:.3f} (standard error)")
    return row


def with_variance(
    model: torch.nn.Module, process: GaussianProcess, variance: str, images: int | None
) -> GaussianProcess:
    """The process with another fixed Σ; the analytic one is estimated on as many training digits."""
    mean_squares = None
    if variance == "analytic":
        data = first(Digits("train"), 256 if images is None else images)
        mean_squares = estimate_eps_mean_square(model, process, data, batch_size=512, progress=True)
    return GaussianProcess(process.betas, process.prediction, variance, process.timestep_map, mean_squares)


def first(digits: Digits, images: int | None) -> list[Any]:
    return [digits[index] for index in range(len(digits) if images is None else images)]


def summary(found: NllResult, process: GaussianProcess) -> dict[str, Any]:
    curve, _ = found.curve
    return {
        "bits_per_dim": found.bits_per_dim,
        "standard_error": found.standard_error,
        "prior": float(found.prior.mean()),
        "kl": float(curve[1:].sum()),
        "decoder": float(curve[0]),
        "terms": rounded(curve),
        "gamma": rounded(process.log_one_minus_alphas_cumprod - np.log(process.alphas_cumprod)),
    }


def rounded(values: np.ndarray) -> list[float]:
    """As many digits as a plot shows."""
    return [float(f"{value:.6g}") for value in values]


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The schedules, the terms of the bound per unit of log SNR, and the bound with its parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (schedules, density, bars) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for index, (name, row) in enumerate(rows.items()):
        gamma, terms = np.array(row["gamma"]), np.array(row["terms"])
        schedules.plot(np.linspace(0, 1, len(gamma)), -gamma, color=f"C{index}", label=name)
        # A step's term over its length in γ; neighbours are averaged, as each is an estimate.
        steps = np.diff(gamma)
        window = max(len(steps) // 50, 1)
        length = len(steps) // window * window
        averaged = (values[:length].reshape(-1, window).sum(1) for values in (terms[1:], steps, gamma[1:] * steps))
        term, step, weighted = averaged
        density.plot(-weighted / step, term / step, color=f"C{index}", label=name)
        bottom = 0.0
        for part, hatch in (("decoder", "///"), ("kl", ""), ("prior", "...")):
            bars.bar(index, row[part], bottom=bottom, color=f"C{index}", alpha=0.75, hatch=hatch, edgecolor="white")
            bottom += row[part]
        error = 1.96 * row["standard_error"]
        bars.errorbar(index, bottom, error, color="black", capsize=4)
        bars.text(index, bottom + error, f"{row['bits_per_dim']:.3f}", ha="center", va="bottom")
    schedules.set(xlabel="t / (T − 1)", ylabel="log SNR", title="Noise schedules")
    density.set(xlabel="log SNR", ylabel="bits/dim per unit of log SNR", title="Where the bound is spent")
    bars.set(ylabel="bits/dim, held-out digits", title="Bound: decoder (///), KL terms, prior (...)")
    bars.set_xticks(range(len(rows)), labels=list(rows))
    bars.margins(y=0.12)
    for axis in (schedules, density):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=TRAIN.steps, help="training steps of each run")
    parser.add_argument("--images", type=int, help="held-out digits to evaluate; all 256 unless given")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument(
        "--out", type=Path, default=Path("out/learned_schedule"), help="folder of the JSON and the plot"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "learned_schedule.json"
    rows = earlier(path, arguments.steps)
    rows |= {name: train_and_evaluate(RUNS[name], arguments.steps, arguments.images) for name in arguments.runs}
    rows = {name: rows[name] for name in RUNS if name in rows}
    report = {
        "machine": machine("cpu", f"python -m benchmarks.learned_schedule --steps {arguments.steps}"),
        "levels": LEVELS,
        "timesteps": TIMESTEPS,
        "steps": arguments.steps,
        "runs": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    draw(path.with_suffix(".png"), rows)
    print(path)


def earlier(path: Path, steps: int) -> dict[str, dict[str, Any]]:
    """The rows of an earlier report of as many training steps, if there is one."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    return report["runs"] if report["steps"] == steps else {}


if __name__ == "__main__":
    main()
