"""Checkpoints on disk: whole or absent, whatever happens while they are written."""

import errno
import json
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from training_cases import assert_same, processes, tiny_process, tiny_trainer

from diffkern.models import CheckpointError
from diffkern.process import GaussianProcess, cosine_betas, linear_betas
from diffkern.training import checkpoint as files
from diffkern.training import find_checkpoint


def write(text):
    return lambda path: path.write_text(text)


def test_the_newest_stay(tmp_path):
    for step in (99_999_999, 5, 100_000_000, 20):
        files.save_checkpoint(tmp_path, step, {"a": write("x")}, keep=4)
    names = [path.name for path in files.list_checkpoints(tmp_path)]
    assert names == ["step_00000005", "step_00000020", "step_99999999", "step_100000000"]
    files.save_checkpoint(tmp_path, 100_000_001, {"a": write("x")}, keep=2)
    assert [files.checkpoint_step(path) for path in files.list_checkpoints(tmp_path)] == [100_000_000, 100_000_001]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_finding(tmp_path):
    result = tiny_trainer(tmp_path, steps=1).fit()
    assert find_checkpoint(tmp_path) == find_checkpoint(result.checkpoint) == result.checkpoint
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor"):
        find_checkpoint(tmp_path / "checkpoints" / "other")


def test_the_process_survives_exactly(tmp_path):
    process = tiny_process(prediction="v", variance="fixed_large").respace(7)
    (tmp_path / files.PROCESS).write_text(json.dumps(files.describe_process(process, (3, 8, 9))))
    read, shape = files.read_process(tmp_path)
    assert shape == (3, 8, 9)
    assert (read.prediction, read.variance) == ("v", "fixed_large")
    np.testing.assert_array_equal(read.betas, process.betas)
    np.testing.assert_array_equal(read.timestep_map, process.timestep_map)
    (tmp_path / files.PROCESS).write_text('{"shape": [3, 8, 9], "betas": ')
    with pytest.raises(CheckpointError, match=r"process.json: not the description"):
        files.read_process(tmp_path)


@pytest.mark.parametrize("name", [files.MODEL, files.EMA, files.TRAINING])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99, None])
def test_a_truncated_checkpoint_is_named(tmp_path, name, left):
    checkpoint = tiny_trainer(tmp_path, steps=1).fit().checkpoint
    if left is None:
        (checkpoint / name).unlink()
    else:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(CheckpointError, match=f"step_00000001/{name}: truncated or not"):
        tiny_trainer(tmp_path, steps=2).fit(resume=True)


def test_a_checkpoint_without_an_objective_is_one_of_the_squared_error(tmp_path):
    """Once there was no other: such a run goes on as the default one, and as no other."""
    whole = tiny_trainer(tmp_path / "whole", steps=4).fit()
    old = tiny_trainer(tmp_path / "old", steps=2).fit().checkpoint
    state = files.read_training_state(old)
    del state["objective"]
    files.write_training_state(old / files.TRAINING, state)
    for other, name in (({"loss": "kl"}, "loss='mse'"), ({"weighting": "p2"}, "weighting=None")):
        with pytest.raises(CheckpointError, match=f"its run had {name}"):
            tiny_trainer(tmp_path / "old", steps=4, **other).fit(resume=True)
    with pytest.raises(CheckpointError, match="its run had prediction='eps', this one has 'v'"):
        tiny_trainer(tmp_path / "old", steps=4, process=tiny_process(prediction="v")).fit(resume=True)
    assert tiny_trainer(tmp_path / "old", steps=4, levels=17).fit(resume=True).losses == whole.losses


def test_a_state_that_lacks_something_is_named(tmp_path):
    checkpoint = tiny_trainer(tmp_path, steps=1).fit().checkpoint
    state = files.read_training_state(checkpoint)
    del state["scaler"], state["step"]
    for found, missing in ((state, "step, scaler"), ({}, "step, losses, order, optimizer, scaler, generators")):
        files.write_training_state(checkpoint / files.TRAINING, found)
        with pytest.raises(CheckpointError, match=f"training.pt: .* it lacks {missing}$"):
            tiny_trainer(tmp_path, steps=2).fit(resume=True)


@pytest.mark.parametrize(
    "other",
    [GaussianProcess(cosine_betas(100)), GaussianProcess(linear_betas(100), timestep_map=np.arange(100) / 2)],
    ids=["schedule", "times"],
)
def test_another_noise_schedule_is_not_gone_on_with(tmp_path, other):
    tiny_trainer(tmp_path, steps=1).fit()
    with pytest.raises(CheckpointError, match="its run had another noise schedule than this one"):
        tiny_trainer(tmp_path, steps=2, process=other).fit(resume=True)
    with pytest.raises(CheckpointError, match="its run had num_timesteps=100, this one has 50"):
        tiny_trainer(tmp_path, steps=2, process=tiny_process().respace(50)).fit(resume=True)


# --- the full disk


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path):
    """A real one, as far as a test can have it: the system refuses every write past a size."""
    old = tiny_trainer(tmp_path, steps=2).fit().checkpoint
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step_00000003: .*could not be written: .*; the checkpoint .*2 is intact"):
            tiny_trainer(tmp_path, steps=3).fit(resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert os.listdir(tmp_path / "checkpoints") == [old.name]
    assert files.checkpoint_step(tiny_trainer(tmp_path, steps=3).fit(resume=True).checkpoint) == 3


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_no_space_at_the_last_moment(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.save_checkpoint(tmp_path, 1, {"a": write("x")}, keep=1)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"could not be written: No space left on device; the checkpoint .*1 is intact"):
        files.save_checkpoint(tmp_path, 2, {"a": write("x")}, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


# --- SIGKILL


def test_killed_while_deleting(tmp_path, monkeypatch):
    """The kill of the next test rarely falls into a deletion; here it does."""

    class Killed(BaseException):
        pass

    def half(path):
        (path / "a").unlink()
        raise Killed

    both = {"a": write("x"), "b": write("x")}
    files.save_checkpoint(tmp_path, 1, both, keep=1)
    monkeypatch.setattr("shutil.rmtree", half)
    with pytest.raises(Killed):
        files.save_checkpoint(tmp_path, 2, both, keep=1)
    monkeypatch.undo()
    (checkpoint,) = files.list_checkpoints(tmp_path)
    assert sorted(os.listdir(checkpoint)) == ["a", "b"]
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000002"]


def train_for_ever(output):
    torch.set_num_threads(1)
    tiny_trainer(output, steps=100_000, checkpoint_every=1, keep_checkpoints=2).fit(resume=True)


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """Six kills, each after one more checkpoint and a random while; then the weights of a run without any."""
    moment = random.Random(0)
    done = 0
    for _ in range(6):
        child = processes.Process(target=train_for_ever, args=(tmp_path,))
        child.start()
        deadline = time.monotonic() + 60
        while newest_step(tmp_path) <= done and child.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        newest = files.list_checkpoints(tmp_path)[-1]
        assert files.checkpoint_step(newest) > done
        done = files.checkpoint_step(newest)
        assert files.read_training_state(newest)["step"] == done
        for checkpoint in files.list_checkpoints(tmp_path):
            assert {path.name for path in checkpoint.iterdir()} == {
                files.MODEL,
                files.EMA,
                files.PROCESS,
                files.TRAINING,
            }
    resumed, whole = tiny_trainer(tmp_path, steps=done + 2), tiny_trainer(steps=done + 2)
    assert resumed.fit(resume=True).losses == whole.fit().losses
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert all(path.name.startswith("step_") for path in (tmp_path / "checkpoints").iterdir())


def newest_step(output):
    return max(map(files.checkpoint_step, files.list_checkpoints(output)), default=0)
