"""Schedule samplers: probabilities, weights, NumPy's draws, and the same history in every process."""

import numpy as np
import pytest
import torch

from diffkern.integrations.guided_diffusion.resample import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from tests.integrations.guided_diffusion.small import STEPS, diffusion


def warmed(history=10, **options):
    """A sampler that has seen the loss t + k at each t, k = 0, …, history − 1."""
    sampler = LossSecondMomentResampler(diffusion(), history_per_term=history, **options)
    for k in range(history):
        sampler.update_with_all_losses(range(STEPS), [float(t + k) for t in range(STEPS)])
    return sampler


def test_names():
    assert isinstance(create_named_schedule_sampler("uniform", diffusion()), UniformSampler)
    second = create_named_schedule_sampler("loss-second-moment", diffusion())
    assert isinstance(second, LossSecondMomentResampler)
    assert isinstance(second, LossAwareSampler)
    assert isinstance(second, ScheduleSampler)
    with pytest.raises(ValueError, match="name is 'loss'; it may be one of 'uniform', 'loss-second-moment'"):
        create_named_schedule_sampler("loss", diffusion())


@pytest.mark.parametrize("sampler", [UniformSampler(diffusion()), warmed()])
def test_draws_are_numpys_and_weights_undo_the_probabilities(sampler):
    p = sampler.weights() / sampler.weights().sum()
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.choice(STEPS, size=(64,), p=p)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    t, weights = sampler.sample(64, torch.device("cpu"))
    assert (t.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert t.tolist() == expected.tolist()
    np.testing.assert_allclose(weights, 1 / (STEPS * p[expected]), rtol=1e-6)
    assert sampler.sample(3, "cpu")[0].shape == (3,)
    # Unbiased: the mean of w·f(t) is that of f over all timesteps.
    t, weights = sampler.sample(200_000, "cpu")
    assert abs((weights * t).mean().item() - (STEPS - 1) / 2) < 0.05


def test_the_second_moment_decides_once_every_timestep_was_seen_often_enough():
    sampler = LossSecondMomentResampler(diffusion())
    assert (sampler.history_per_term, sampler.uniform_prob) == (10, 0.001)
    for _ in range(10):
        assert sampler.weights().tolist() == [1.0] * STEPS
        sampler.update_with_all_losses(range(1, STEPS), [2.0] * (STEPS - 1))
    assert sampler.weights().tolist() == [1.0] * STEPS  # t = 0 was never seen
    sampler.update_with_all_losses([0] * 10, [6.0] * 10)
    expected = np.array([6.0] + [2.0] * (STEPS - 1))
    expected = 0.999 * expected / expected.sum() + 0.001 / STEPS
    np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-12)


def test_only_the_last_losses_count():
    sampler = warmed(history=3, uniform_prob=0.0)
    sampler.update_with_all_losses([4, 4], [100.0, 200.0])
    moments = [np.sqrt(np.mean([(t + k) ** 2 for k in range(3)])) for t in range(STEPS)]
    moments[4] = np.sqrt((6**2 + 100**2 + 200**2) / 3)
    np.testing.assert_allclose(sampler.weights(), np.array(moments) / np.sum(moments), rtol=1e-12)


def test_one_process_needs_no_group():
    sampler, expected = (LossSecondMomentResampler(diffusion(), history_per_term=1) for _ in range(2))
    losses = torch.rand(STEPS, requires_grad=True)
    sampler.update_with_local_losses(torch.arange(STEPS), losses)
    expected.update_with_all_losses(range(STEPS), losses.tolist())
    assert sampler.weights().tolist() == expected.weights().tolist()
    assert not np.allclose(sampler.weights(), 1 / STEPS)
    with pytest.raises(ValueError, match="local_losses has 1 entries; it must have local_ts's 2"):
        sampler.update_with_local_losses(torch.tensor([1, 2]), torch.tensor([0.5]))


def _process(rank, path):
    """Batches of 3 and 5, so that lengths differ; what it has learned goes to a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    sampler = LossSecondMomentResampler(diffusion(), history_per_term=2)
    for k in range(5):
        t = torch.arange(8)[:3] if rank == 0 else torch.arange(8)[3:]
        t = (t + 8 * k) % STEPS
        sampler.update_with_local_losses(t, (t + k + 1).float())
    np.savez(path / f"{rank}.npz", history=sampler._loss_history, weights=sampler.weights())
    torch.distributed.destroy_process_group()


def test_two_processes_learn_the_same_from_batches_of_unequal_size(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
    alone = LossSecondMomentResampler(diffusion(), history_per_term=2)
    for k in range(5):
        t = (torch.arange(8) + 8 * k) % STEPS
        alone.update_with_local_losses(t, (t + k + 1).float())
    for rank in range(2):
        learned = np.load(tmp_path / f"{rank}.npz")
        assert (learned["history"] == alone._loss_history).all()
        assert (learned["weights"] == alone.weights()).all()
    assert alone.weights().max() > 1.5 * alone.weights().min()
