"""How a run stops: NaN, Ctrl-C, an image that cannot be used. What was saved stays good."""

import multiprocessing
import os
import signal

import pytest
import torch
from training_cases import TinyNet, assert_same, tiny_data, tiny_trainer

from diffkern.training import TrainingInterrupted
from diffkern.training.checkpoint import list_checkpoints, read_weights


class FailingNet(TinyNet):
    """From the fourth call on, the loss or only the gradient is NaN."""

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def forward(self, x, t, y):
        self.calls += 1
        out = super().forward(x, t, y)
        if self.calls < 4:
            return out
        return out * float("nan") if self.where == "loss" else out + torch.sqrt(0 * out)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_names_the_step_and_spoils_no_checkpoint(tmp_path, where):
    with pytest.raises(FloatingPointError, match=f"the {where} is nan in step 4 of 9; .* checkpoint is .*00000003"):
        tiny_trainer(tmp_path, model=FailingNet(where), steps=9, checkpoint_every=1).fit()
    newest = list_checkpoints(tmp_path)[-1]
    assert newest.name == "step_00000003"
    for name in ("model", "ema"):
        assert all(tensor.isfinite().all() for tensor in read_weights(newest / f"{name}.safetensors").values())


def test_nan_weights_are_never_saved(tmp_path):
    model = TinyNet()
    model.unused = torch.nn.Parameter(torch.tensor(float("nan")), requires_grad=False)
    with pytest.raises(FloatingPointError, match="unused holds NaN or Inf after step 2"):
        tiny_trainer(tmp_path, model=model, steps=2).fit()
    assert not list_checkpoints(tmp_path)


class InterruptingData:
    """Twenty images; while the 21st is read, Ctrl-C comes to the reading process and to the training process."""

    def __init__(self, times):
        self.items, self.reads, self.times, self.training = tiny_data(), 0, times, os.getpid()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 21:
            for _ in range(self.times):
                for process in {os.getpid(), self.training}:
                    os.kill(process, signal.SIGINT)
        return self.items[index]


def test_ctrl_c_finishes_the_step_saves_and_says_where(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"after step 3; saved to .*step_00000003") as caught:
        tiny_trainer(tmp_path, data=InterruptingData(1), steps=9).fit()
    assert caught.value.checkpoint == list_checkpoints(tmp_path)[-1]
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = tiny_trainer(tmp_path, steps=5)
    resumed.fit(resume=True)
    whole = tiny_trainer(steps=5)
    whole.fit()
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


@pytest.fixture
def _fresh_processes():
    """Loading processes that inherit no signal handler, as is the default from Python 3.14 on."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("_fresh_processes")
def test_ctrl_c_spares_the_loading_processes(tmp_path):
    data = InterruptingData(1)
    with pytest.raises(TrainingInterrupted, match="after step 1"):
        tiny_trainer(tmp_path, data=data, steps=9, workers=1, batch_size=24, accumulation=3).fit()
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny_trainer(tmp_path, data=InterruptingData(2), steps=9).fit()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not list_checkpoints(tmp_path)


def test_image_with_nan_is_named():
    data = tiny_data()
    data[13] = (torch.full((1, 4, 4), float("inf")), 0)
    with pytest.raises(ValueError, match="image 13 of the data holds NaN or Inf"):
        tiny_trainer(data=data, steps=9).fit()
