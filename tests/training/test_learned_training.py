"""A run that learns its schedule: what it changes, saves, resumes, and what samples from it."""

import os
import socket

import numpy as np
import pytest
import torch
from training_cases import TinyNet, assert_same, processes, tiny_trainer

from diffkern.cli import main
from diffkern.models import CheckpointError
from diffkern.sampling import Sampler
from diffkern.training import LearnedLogSNR, LearnedSchedule, find_checkpoint
from diffkern.training.checkpoint import read_process, read_training_state, read_weights
from diffkern.training.schedule_state import SCHEDULE, SCHEDULE_EMA

LEARNED = LearnedSchedule(num_timesteps=50)
LEVELS = 17


def learned_trainer(output=None, **config):
    return tiny_trainer(output, process=config.pop("process", LEARNED), levels=LEVELS, **config)


def test_a_run_moves_the_ends_and_the_interior_and_returns_their_tables(tmp_path):
    result = learned_trainer(tmp_path, steps=30).fit()
    assert np.isfinite(result.losses).all()
    first, trained = LEARNED.build(LEVELS), LEARNED.build(LEVELS)
    trained.load_state_dict(read_weights(result.checkpoint / SCHEDULE))
    for name, weight in first.named_parameters():
        assert not torch.equal(weight, trained.get_parameter(name)), name
    averaged = LearnedLogSNR()
    averaged.load_state_dict(read_weights(result.checkpoint / SCHEDULE_EMA))
    process, shape = read_process(result.checkpoint)
    assert shape == (1, 4, 4)
    expected = averaged.process(50)
    for found in (process, result.process):
        np.testing.assert_array_equal(found.betas, expected.betas)
        np.testing.assert_array_equal(found.timestep_map, expected.timestep_map)
    images = Sampler(result.ema, process, shape=shape, steps=5).sample(2, labels=[0, 1])
    assert torch.isfinite(images).all()


def test_the_loss_is_the_bound_and_falls(tmp_path):
    """From knowing nothing, log2 of the number of levels and more, in bits/dim."""
    losses = learned_trainer(steps=150, lr=5e-3).fit().losses
    assert losses[0] > 4
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.5


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, prediction):
    description = LearnedSchedule(num_timesteps=50, prediction=prediction)
    whole = learned_trainer(tmp_path / "whole", steps=8, process=description).fit()
    learned_trainer(tmp_path / "parts", steps=5, process=description).fit()
    parts = learned_trainer(tmp_path / "parts", steps=8, process=description).fit(resume=True)
    assert parts.losses == whole.losses
    for name in ("model.safetensors", "ema.safetensors", SCHEDULE, SCHEDULE_EMA):
        assert_same(read_weights(parts.checkpoint / name), read_weights(whole.checkpoint / name))
    one, other = (read_training_state(result.checkpoint)["optimizer"] for result in (parts, whole))
    assert len(one["param_groups"]) == 2
    for index, state in one["state"].items():
        assert_same(state, other["state"][index])
    np.testing.assert_array_equal(parts.process.betas, whole.process.betas)


def test_accumulated_micro_batches_are_one_batch():
    torch.manual_seed(1)
    one = learned_trainer(steps=3, model=TinyNet(dropout=0), batch_size=16).fit()
    torch.manual_seed(1)
    many = learned_trainer(steps=3, model=TinyNet(dropout=0), batch_size=16, accumulation=4).fit()
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.process.betas, one.process.betas, rtol=1e-5)


def test_the_schedules_weights_do_not_decay_and_learn_at_their_own_rate():
    still = LearnedSchedule(num_timesteps=50, lr_scale=0.0)
    result = learned_trainer(steps=5, process=still, weight_decay=0.5).fit()
    np.testing.assert_array_equal(result.process.betas, still.build(LEVELS).process(50).betas)


def test_runs_with_and_without_a_schedule_do_not_mix(tmp_path):
    learned_trainer(tmp_path / "learned", steps=1).fit()
    tiny_trainer(tmp_path / "given", steps=1).fit()
    with pytest.raises(CheckpointError, match="continuous_bound"):
        tiny_trainer(tmp_path / "learned", steps=2).fit(resume=True)
    with pytest.raises(CheckpointError, match="continuous_bound"):
        learned_trainer(tmp_path / "given", steps=2).fit(resume=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", "kl"), ("weighting", "min_snr"), ("offset_noise", 0.1), ("self_conditioning", 0.5)],
)
def test_settings_that_do_not_go_with_a_learned_schedule_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        learned_trainer(**{field: value})


def test_a_schedule_that_makes_no_tables_is_refused_before_training():
    with pytest.raises(ValueError, match=r"betas\[0\] is"):
        learned_trainer(process=LearnedSchedule(num_timesteps=50, gamma_0=-40.0), model=Untouched()).fit()


class Untouched(TinyNet):
    def forward(self, x, t, y):
        raise AssertionError("a step was made")


def train_as_rank(rank, port, output):
    torch.set_num_threads(1)
    os.environ.update(
        ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(1)
    learned_trainer(output, model=TinyNet(dropout=0), steps=5, accumulation=2, batch_size=16).fit()
    torch.distributed.destroy_process_group()


def test_two_processes_learn_the_schedule_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=train_as_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    torch.manual_seed(1)
    alone = learned_trainer(model=TinyNet(dropout=0), steps=5, batch_size=16).fit()
    process, _ = read_process(find_checkpoint(tmp_path))
    np.testing.assert_allclose(process.betas, alone.process.betas, rtol=1e-4)


def test_command_line_trains_and_samples(tmp_path, capsys):
    tiny = ["--model.channels", "8", "--model.channel-mult", "1", "--model.num-res-blocks", "1"]
    tiny += ["--model.num-groups", "4", "--batch-size", "8", "--process.num-timesteps", "50", "--no-progress"]
    learned = ["train", "--output", str(tmp_path / "run"), "--process.schedule", "learned", *tiny]
    assert main([*learned, "--steps", "2"]) == 0
    assert main(["train", "--output", str(tmp_path / "run"), "--steps", "3", "--resume"]) == 0
    assert main(["sample", str(tmp_path / "run"), "--n", "2", "--steps", "3", "--output", str(tmp_path / "out")]) == 0
    process, _ = read_process(find_checkpoint(tmp_path / "run"))
    assert process.num_timesteps == 50
    first = LearnedSchedule().build(LEVELS)  # which the digits say themselves
    assert 1 - process.alphas_cumprod[0] == pytest.approx(torch.sigmoid(first.ends()[0]).item(), rel=0.05)
    learned[2] = str(tmp_path / "other")
    assert main([*learned, "--steps", "2", "--process.variance", "learned_range"]) != 0
    assert "variance='learned_range'" in capsys.readouterr().err


def test_the_tables_serve_a_diffusers_scheduler_and_guided_diffusion():
    """As docs/learned_schedule.md has it: betas as they are, and a network that is told the map's time."""
    pytest.importorskip("diffusers")
    from diffkern.integrations.diffusers import DDIMScheduler
    from diffkern.integrations.guided_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

    process = LearnedSchedule().build(256).process(1000)
    times = torch.tensor(process.timestep_map, dtype=torch.float32)
    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        return torch.tanh(x * (1 + t[:, None, None, None] / 2000))

    def told(x, t):
        return network(x, times[t])

    def sampled(steps):
        return Sampler(network, process, (1, 4, 4), steps=steps, spacing="trailing").sample(2, start=(x_T, 999))

    scheduler = DDIMScheduler(trained_betas=process.betas.tolist(), timestep_spacing="trailing", clip_sample=True)
    scheduler.alphas_cumprod = torch.tensor(process.alphas_cumprod)
    scheduler.set_timesteps(20)
    images = x_T
    for t in scheduler.timesteps:
        images = scheduler.step(told(images, t.expand(2)), t, images, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(images, sampled(20), rtol=0, atol=1e-6)
    kinds = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.FIXED_SMALL}
    diffusion = GaussianDiffusion(betas=process.betas, loss_type=LossType.MSE, **kinds)
    images = diffusion.ddim_sample_loop(told, (2, 1, 4, 4), noise=x_T)
    torch.testing.assert_close(images, sampled(None), rtol=0, atol=1e-6)
