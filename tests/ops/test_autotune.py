"""DIFFKERN_AUTOTUNE=1: the fastest candidate is taken, and remembered on disk. The GPU and its clock are stand-ins."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from diffkern.ops._triton import autotune, launch


@dataclass(frozen=True)
class Choice:
    elements: int


CANDIDATES = [Choice(512), Choice(1024), Choice(2048)]
GPU = torch.device("cuda", 0)


class Clock:
    """Times candidates as `microseconds` says, and counts how often it was asked."""

    def __init__(self, microseconds):
        self.microseconds, self.asked = microseconds, 0

    def __call__(self, run):
        self.asked += 1
        return self.microseconds[run.args[0].elements]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    found = Clock({512: 3.0, 1024: 1.0, 2048: 2.0})
    monkeypatch.setenv("DIFFKERN_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU / of NVIDIA's")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "seconds", found)
    autotune._table.cache_clear()
    yield found
    autotune._table.cache_clear()


def tuned(key=("64×64",), device=GPU):
    return autotune.tuned("a_kernel", key, CANDIDATES, CANDIDATES[0], lambda choice: None, device)


def test_the_fastest_is_measured_once_for_each_key(clock):
    assert tuned() == Choice(1024)
    asked = clock.asked
    assert tuned() == Choice(1024)
    assert clock.asked == asked
    clock.microseconds = {512: 3.0, 1024: 2.0, 2048: 1.0}
    assert tuned(("8×8",)) == Choice(2048)


def test_the_heuristics_choice_may_be_the_fastest_and_is_remembered_too(clock):
    clock.microseconds = {512: 1.0, 1024: 2.0, 2048: 3.0}
    for _ in range(2):
        found = autotune.tuned("a_kernel", (), CANDIDATES[1:], CANDIDATES[0], lambda choice: None, GPU)
        assert found == Choice(512)
        asked = clock.asked
    assert asked == 3


@pytest.mark.parametrize("error", [OutOfResources(2**18, 2**17, "shared memory"), RuntimeError("a pass failed")])
def test_a_candidate_that_cannot_run_is_not_chosen(clock, monkeypatch, error):
    def seconds(run):
        if run.args[0] == failing:
            raise error
        return clock(run)

    monkeypatch.setattr(autotune, "seconds", seconds)
    failing = Choice(1024)
    assert tuned() == Choice(2048)
    failing = CANDIDATES[0]
    with pytest.raises(type(error)):
        tuned(("8×8",))


def test_another_process_reads_it_from_disk(clock):
    tuned()
    autotune._table.cache_clear()
    clock.microseconds = {}  # measuring anything would raise
    assert tuned() == Choice(1024)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a_kernel 64×64": {"elements": 4096}}'])
def test_a_damaged_or_outdated_file_is_measured_anew(clock, text):
    path = autotune.cache_file(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tuned() == Choice(1024)
    autotune._table.cache_clear()
    assert autotune._table(path) == {"a_kernel 64×64": {"elements": 1024}}


def test_a_disk_that_cannot_be_written_is_no_error(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert tuned() == Choice(1024)


def test_the_heuristic_stays_without_it(clock, monkeypatch):
    assert tuned(device=torch.device("cpu")) == CANDIDATES[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned() == CANDIDATES[0]
    monkeypatch.delenv("DIFFKERN_AUTOTUNE")
    assert tuned() == CANDIDATES[0]
    assert clock.asked == 0


class Kernel:
    """Notes with how many warps it is launched."""

    __name__ = "a_kernel"
    arg_names = ("x", "seed", "BLOCK")

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda *arguments, num_warps, maxnreg: self.seen.append((num_warps, maxnreg))


def test_a_launch_tries_half_and_twice_the_warps(clock, monkeypatch):
    monkeypatch.setattr(autotune, "seconds", lambda run: {2: 2.0, 4: 3.0, 8: 1.0}[run.args[0].num_warps])
    monkeypatch.setattr(launch, "_current", lambda device: nullcontext())
    kernel = Kernel()
    arguments = {"x": torch.ones(3), "seed": 5, "BLOCK": 64}
    launch.launch(kernel, 1, GPU, num_warps=4, registers=128, **arguments)
    launch.launch(kernel, 1, GPU, num_warps=4, registers=128, **arguments | {"seed": 6})
    assert kernel.seen == [(8, None)] * 2
    launch.launch(kernel, 1, GPU, num_warps=4, registers=128, repeatable=False, **arguments)
    assert kernel.seen[2:] == [(4, 128)]
    assert len(autotune._table(autotune.cache_file(GPU))) == 1


def test_strides_have_choices_of_their_own(clock, monkeypatch):
    monkeypatch.setattr(autotune, "seconds", lambda run: run.args[0].num_warps)
    monkeypatch.setattr(launch, "_current", lambda device: nullcontext())
    kernel = Kernel()
    kernel.arg_names = ("x", "x_strides")
    for strides in ((192, 64, 8, 1), (192, 64, 1, 8)):
        launch.launch(kernel, 1, GPU, x=torch.ones(3), x_strides=strides)
    assert len(autotune._table(autotune.cache_file(GPU))) == 2
