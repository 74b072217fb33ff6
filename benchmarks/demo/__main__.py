"""`make demo`: train on 1,541 real digits, draw new ones, say how good and how fast that was."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import figures, metrics
from benchmarks.demo.comparison import Comparison, compare_sampling, compare_training
from diffkern import __version__, backends
from diffkern.models import UNet, UNetConfig
from diffkern.process import GaussianProcess
from diffkern.process.schedules import cosine_betas
from diffkern.sampling import Sampler
from diffkern.training import Digits, TrainConfig, Trainer

PER_CLASS = 10
GUIDANCE = 1.5  # of the conditional over the unconditional output; 1 is none
TRAIN = TrainConfig(steps=2000, batch_size=64, lr=1e-3, warmup_steps=100, ema_decay=0.995, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the pictures and metrics.json")
    parser.add_argument("--steps", type=int, default=TRAIN.steps, help="training steps")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    begin = time.perf_counter()
    torch.manual_seed(0)
    train, heldout = Digits("train"), Digits("heldout")
    # Convolutions prefer channels last, on both sides of the comparison below.
    model = UNet(UNetConfig.digits()).to(memory_format=torch.channels_last)
    process = GaussianProcess(cosine_betas(1000))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"training {parameters / 1e6:.2f} M parameters on {len(train)} digits, {torch.get_num_threads()} threads")
    config = TrainConfig(**{**vars(TRAIN), "steps": arguments.steps})
    result = Trainer(model, process, train, config).fit()
    figures.plot_losses(arguments.out / "loss.png", result.losses)

    network = result.ema
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    print(f"drawing {len(labels)} digits with DDIM in 50 steps, then with the ancestral DDPM in 1000")
    ddim = draw(network, process, labels, solver="ddim", steps=50)
    ddpm = draw(network, process, labels, solver="ddpm", steps=None)
    figures.plot_samples(
        arguments.out / "samples.png", {"DDIM, 50 steps": ddim, "ancestral DDPM, 1000 steps": ddpm}, PER_CLASS
    )

    print("timing against the same network and sampler in torch.nn.functional")
    rows = [compare_training(model, process, train, config), *compare_sampling(network, process, labels)]
    values = {
        "class_agreement_ddim": metrics.class_agreement(ddim, labels, train),
        "class_agreement_ddpm": metrics.class_agreement(ddpm, labels, train),
        "nearest_neighbour_ratio": metrics.nearest_neighbour_ratio(ddim, train, heldout),
        "train_step_ratio": rows[0].ratio,
        "sample_step_ratio": rows[1].ratio,
        "sample_step_ratio_ddpm": rows[2].ratio,
        "training_images_per_second": result.images_per_second,
        "seconds": time.perf_counter() - begin,
        "versions": versions(),
    }
    (arguments.out / "metrics.json").write_text(json.dumps(values, indent=2) + "\n")
    report(rows, values, arguments.out)


def draw(
    network: torch.nn.Module, process: GaussianProcess, labels: Tensor, *, solver: str, steps: int | None
) -> np.ndarray:
    """Digits of the given classes: float32 (n, 8, 8) in [−1, 1]."""
    sampler = Sampler(network, process, shape=(1, 8, 8), solver=solver, steps=steps, guidance_scale=GUIDANCE)
    return sampler.sample(len(labels), seed=1, labels=labels, progress=True)[:, 0].cpu().numpy()


def versions() -> dict[str, str]:
    return {
        "diffkern": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "group_norm": backends.explain("group_norm"),
    }


def report(rows: list[Comparison], values: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="diffkern against torch.nn.functional, interleaved in this process (medians)")
    for heading in ("one step of", "eager", "diffkern", "ratio"):
        table.add_column(heading, justify="left" if heading == "one step of" else "right")
    for row in rows:
        table.add_row(row.what, f"{1e3 * row.eager:.2f} ms", f"{1e3 * row.diffkern:.2f} ms", f"{row.ratio:.2f}×")
    console = Console()
    console.print(table)
    console.print(
        f"a classifier recognises {values['class_agreement_ddim']:.0%} (DDIM) and {values['class_agreement_ddpm']:.0%} "
        f"(DDPM) of the digits as what was asked for; distance to the nearest real digit: "
        f"{values['nearest_neighbour_ratio']:.2f} of that of unseen real ones"
    )
    console.print(f"{values['seconds']:.0f} s in all; see {out / 'samples.png'}, loss.png and metrics.json")


if __name__ == "__main__":
    main()
