"""Gradients through whole runs: of x', of x0, and through what is remembered between steps."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers.cases import in_float64, pair

CASES = [
    ("DDIMScheduler", {"clip_sample_range": 3.0}),
    ("DDPMScheduler", {"clip_sample_range": 3.0}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "churn": 2.0}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"prediction_type": "v_prediction", "clip_sample": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_gradients_are_diffusers(name, config):
    """Of a loss on the last state and on every x0, with respect to the first state and to the network's weight."""
    config = dict(config)
    extra = {"s_churn": config.pop("churn")} if "churn" in config else {}
    theirs, mine = pair(name, config)
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.linspace(-1, 1, start.numel(), dtype=torch.float64).reshape(start.shape)
    results = []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(6)
        if scheduler is theirs and hasattr(theirs, "sigmas"):
            theirs.sigmas = torch.tensor(mine._levels)
        x = (start * float(mine.init_noise_sigma)).requires_grad_()
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        source = {"generator": torch.Generator().manual_seed(1)} if name.startswith(("DD", "DPM", "Euler")) else {}
        state, loss = x, 0.0
        with in_float64() if scheduler is theirs else contextlib.nullcontext():
            for t in scheduler.timesteps:
                output = (weight * scheduler.scale_model_input(state, t)).sin()
                out = scheduler.step(output, t, state, **extra, **source)
                state = out.prev_sample
                if out.get("pred_original_sample") is not None:
                    loss = loss + (weights * out.pred_original_sample).sum()
            loss = loss + (weights * state).sum()
        results.append(torch.autograd.grad(loss, (x, weight)))
    # Its noise stays float32 in diffusers' float64 run.
    tolerance = 2e-7 if "algorithm_type" in config else 1e-9
    for actual, expected in zip(*results, strict=True):
        assert error(actual.numpy(), expected.numpy()) < tolerance
