"""A process whose network is given fractional times: they reach it exactly, as float32, whoever calls it."""

import json

import numpy as np
import pytest
import torch

from diffkern import Sampler
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import SOLVERS
from diffkern.training import TrainConfig
from diffkern.training.checkpoint import PROCESS, describe_process, read_process
from diffkern.training.loss import TrainingLoss
from diffkern.training.objective import make_objective

T = 40
TIMES = np.linspace(0.125, 99.875, T)


class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))
        self.seen = []

    def forward(self, x, t):
        self.seen.append(t)
        return self.weight * x


def fractional(**kwargs):
    return GaussianProcess(linear_betas(1000)[:T], timestep_map=TIMES, **kwargs)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if "inverse" not in name])
def test_every_solver_calls_the_network_at_them(solver):
    process, model = fractional(), Recorder()
    Sampler(model, process, (1, 4, 4), solver=solver, steps=8).sample(2)
    seen = torch.stack(model.seen)
    assert seen.dtype == torch.float32
    # Singlestep solvers and Heun's go between the steps too; those that are steps are the map's, rounded once.
    kept = process.respace(8).timestep_map.astype(np.float32)
    assert np.isin(kept[1:], seen.numpy()).all()
    assert ((seen >= 0.12) & (seen <= 99.9)).all()


def test_training_gives_them_to_the_network():
    process, model = fractional(), Recorder()
    objective = make_objective(TrainConfig(), process, levels=256, takes_self_cond=False)
    loss = TrainingLoss(process, objective, seed=1, null_label=None, label_dropout=0.0, device=torch.device("cpu"))
    samples = torch.arange(64)
    loss(model, torch.zeros(64, 1, 2, 2), samples, torch.tensor(0), samples).backward()
    assert model.seen[0].dtype == torch.float32
    assert np.isin(model.seen[0].numpy(), TIMES.astype(np.float32)).all()
    assert len(model.seen[0].unique()) > 20
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    "process",
    [
        fractional(prediction="v"),
        GaussianProcess([0.1, 0.2], timestep_map=[1.0, 3.0]),
        fractional(variance="analytic", eps_mean_square=np.linspace(0.1, 0.99, T)).respace(7),
    ],
)
def test_a_checkpoint_keeps_them_and_the_analytic_variance(tmp_path, process):
    (tmp_path / PROCESS).write_text(json.dumps(describe_process(process, (1, 2, 3))))
    read, shape = read_process(tmp_path)
    assert shape == (1, 2, 3)
    assert read.timestep_map.dtype == np.float64
    for name in ("timestep_map", "betas", "model_log_variance", "eps_mean_square"):
        np.testing.assert_array_equal(getattr(read, name), getattr(process, name))
    assert (read.prediction, read.variance) == (process.prediction, process.variance)
