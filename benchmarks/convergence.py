"""Orders of convergence on a closed-form problem: the exact score of a mixture of Gaussians.

`python -m benchmarks.convergence` draws docs/images/convergence.png; the tests measure slopes with the same problem.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffkern import backends
from diffkern.ops import solver_step
from diffkern.solvers import SOLVERS, StepProgram, Transitions, chain

FIRST, LAST = -8.0, 2.0  # λ = log(α/σ) at both ends: σ = 0.9999998 and 0.13 of a variance-preserving state
WEIGHTS, MEANS, STDS = np.array([0.3, 0.5, 0.2]), np.array([-1.0, 0.4, 1.3]), np.array([0.45, 0.35, 0.5])
STARTS = np.linspace(-2.0, 2.0, 17)  # x at λ = FIRST, where it is nearly unit noise
PLOTTED = (12, 24, 48, 96, 192, 384)  # steps: whole groups of 2 and of 3
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "convergence.png"


def levels(lambdas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(α, σ) with α² + σ² = 1 and log(α/σ) = `lambdas`."""
    return 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))


def denoise(x: np.ndarray, lam: float) -> np.ndarray:
    """E[x0 | x] where x = α·x0 + σ·ε and x0 has the mixture's distribution."""
    alpha, sigma = levels(np.float64(lam))
    variance = alpha**2 * STDS**2 + sigma**2
    residual = x[..., None] - alpha * MEANS
    exponent = np.log(WEIGHTS) - 0.5 * np.log(variance) - residual**2 / (2 * variance)
    posterior = np.exp(exponent - exponent.max(-1, keepdims=True))
    posterior /= posterior.sum(-1, keepdims=True)
    return (posterior * (MEANS + alpha * STDS**2 / variance * residual)).sum(-1)


def exact(first: float = FIRST, last: float = LAST) -> np.ndarray:
    """x at λ = `last` of the probability-flow ODE from STARTS at `first`, to about 1e-12."""
    from scipy.integrate import solve_ivp

    def velocity(lam: float, x: np.ndarray) -> np.ndarray:
        # d(x/σ)/dλ = e^λ·x0 (Lu et al. 2022, arXiv 2211.01095, eq. 7), with dσ/dλ = −α²·σ.
        alpha, _ = levels(np.float64(lam))
        return alpha * denoise(x, lam) - alpha**2 * x

    solution = solve_ivp(velocity, (first, last), STARTS, method="DOP853", rtol=1e-13, atol=1e-13)
    return np.asarray(solution.y[:, -1])


def grid(steps: int, prediction: str = "eps", uneven: float = 1.0) -> Transitions:
    """`steps` rows from FIRST to LAST, every second `uneven` times as long in λ; the network is told λ."""
    lengths = np.where(np.arange(steps) % 2, uneven, 1.0)
    lambdas = FIRST + (LAST - FIRST) * np.append(0.0, np.cumsum(lengths) / lengths.sum())
    return chain(*levels(lambdas), lambdas[:-1], prediction)


def program(name: str, steps: Transitions, **options: Any) -> StepProgram:
    """The program of the solver called `name`, without clipping."""
    solver = SOLVERS[name]
    return solver.function(steps, clip=None, threshold=None, **{**solver.fixed, **options})


def network(x: np.ndarray, lam: float) -> np.ndarray:
    """The exact ε."""
    alpha, sigma = levels(np.float64(lam))
    return (x - alpha * denoise(x, lam)) / sigma


def run(table: StepProgram) -> np.ndarray:
    """x after the last row, by `solver_step` in float64 on the reference backend."""
    x = torch.from_numpy(STARTS.reshape(1, 1, -1))
    slots = torch.full((table.num_slots, *x.shape), torch.nan, dtype=torch.float64) if table.num_slots else None
    x_in = x
    with backends.use_backend("reference"):
        for row, lam in enumerate(table.times):
            output = torch.from_numpy(network(x_in.numpy(), float(lam))) if table.calls_network[row] else x
            step = solver_step(x, output, table, row, slots=slots)
            x, x_in = (step, step) if isinstance(step, torch.Tensor) else step
    return x.numpy().reshape(-1)


def draw(path: Path) -> None:
    """The error at the end against the number of network evaluations, for every solver that adds no noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reference = exact()
    figure, axes = plt.subplots(figsize=(8.5, 5.5))
    lines = []
    for name, solver in SOLVERS.items():
        if solver.own_steps or program(name, grid(6)).makes_noise:
            continue
        tables = [program(name, grid(steps)) for steps in PLOTTED]
        lines.append(
            (name, [t.calls_network.sum() for t in tables], [np.abs(run(t) - reference).max() for t in tables])
        )
    lines.sort(key=lambda line: -line[2][-1])
    colours = plt.get_cmap("tab20").colors
    for index, (name, calls, errors) in enumerate(lines):
        slope = np.log(errors[-2] / errors[-1]) / np.log(calls[-1] / calls[-2])
        axes.loglog(
            calls,
            errors,
            marker="osD^v"[index % 5],
            markersize=4,
            color=colours[index % 20],
            label=f"{name} ({slope:.1f})",
        )
    axes.set(xlabel="network evaluations", ylabel="largest error at the end", title="Mixture of Gaussians, exact score")
    axes.set_xticks(PLOTTED, labels=[str(steps) for steps in PLOTTED])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="solver (slope at the end)", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(out)
    print(out)


if __name__ == "__main__":
    main()
