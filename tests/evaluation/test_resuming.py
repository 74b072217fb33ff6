"""An evaluation that was ended in any way goes on to the same bits, and never with other settings."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from diffkern.evaluation import estimate_eps_mean_square, evaluate_nll
from diffkern.process import GaussianProcess, linear_betas
from tests.conftest import ROOT
from tests.evaluation.problems import GaussianDenoiser, gaussian_images

LEVELS = 257


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_process(**kwargs):
    return GaussianProcess(linear_betas(50), **kwargs)


def evaluate(output, *, delay=0.0, model=None, process=None, count=30, **kwargs):
    """Batches of 16 pairs of 30 images and 50 timesteps: images are cut in the middle."""
    process = process or small_process()
    defaults = {"levels": LEVELS, "batch_size": 16, "save_every": 0.0, "output": output}
    model = model or GaussianDenoiser(process, delay)
    return evaluate_nll(model, process, gaussian_images(count, LEVELS), **{**defaults, **kwargs})


def assert_same(one, other):
    for name in ("vb", "mse", "x0_mse", "prior"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.to_json() == other.to_json()


def done(path):
    with np.load(path) as arrays:
        return int(arrays["done"]), arrays["vb"]


CHILD = """
import sys, torch
from pathlib import Path
from tests.evaluation.test_resuming import evaluate
torch.set_num_threads(1)
evaluate(Path(sys.argv[1]), delay=0.01)
"""


def test_a_killed_evaluation_goes_on_to_the_same_bits(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "run")], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        # Written with every batch: the kill may come in the middle of a write.
        while not (tmp_path / "run" / "nll.npz").exists() or done(tmp_path / "run" / "nll.npz")[0] < 200:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
    finally:
        child.kill()  # SIGKILL
        child.wait()
    pairs, vb = done(tmp_path / "run" / "nll.npz")
    assert 200 <= pairs < 1500
    assert np.isfinite(vb.reshape(-1)[:pairs]).all()
    assert np.isnan(vb.reshape(-1)[pairs:]).all()
    assert not (tmp_path / "run" / "nll.json").exists()

    model = GaussianDenoiser(small_process())
    resumed = evaluate(tmp_path / "run", model=model, resume=True)
    assert model.calls == -(-(1500 - pairs) // 16)  # what was done is not done again
    assert_same(resumed, evaluate(tmp_path / "whole"))
    assert json.loads((tmp_path / "run" / "nll.json").read_text()) == json.loads(
        (tmp_path / "whole" / "nll.json").read_text()
    )


class Stopping(GaussianDenoiser):
    """Ends in `error` at its fifth call, once."""

    error = None

    def forward(self, x, t):
        if self.error is not None and self.calls == 5:
            error, self.error = self.error, None
            raise error
        return super().forward(x, t)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_was_done_before_ctrl_c_or_an_error_is_kept(tmp_path, error):
    model = Stopping(small_process())
    model.error = error
    expected = "interrupted after 80 of 1,500 terms; kept in .*nll.npz" if error.args == () else "out of memory"
    with pytest.raises(type(error), match=expected):
        evaluate(tmp_path / "run", model=model, save_every=1e9)
    assert done(tmp_path / "run" / "nll.npz")[0] == 80
    assert_same(evaluate(tmp_path / "run", model=model, resume=True), evaluate(None, model=model))


def test_a_finished_one_is_read_again_and_never_overwritten(tmp_path):
    whole = evaluate(tmp_path)
    model = GaussianDenoiser(small_process())
    assert_same(evaluate(tmp_path, model=model, resume=True), whole)
    assert model.calls == 0
    with pytest.raises(FileExistsError, match=r"nll.npz: holds an earlier evaluation: resume"):
        evaluate(tmp_path)
    assert_same(evaluate(tmp_path / "new", resume=True), whole)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"seed": 1}, "seed=0, not 1"),
        ({"levels": 129}, "levels=257, not 129"),
        ({"clip": None}, r"clip=\[-1.0, 1.0\], not None"),
        ({"draws": 2}, "draws=1, not 2"),
        ({"batch_size": 17}, "batch_size=16, not 17"),
        ({"count": 29}, "data_sha256=.*, images=30, not 29"),
        ({"process": small_process(variance="fixed_large")}, "variance='fixed_small', not 'fixed_large'"),
        ({"process": small_process().keep(range(49))}, "num_timesteps=50, not 49, process_sha256="),
        ({"model": torch.nn.Conv2d(1, 1, 1)}, "weights_sha256="),
    ],
)
@pytest.mark.filterwarnings("ignore:.*grey levels")
def test_other_settings_are_refused(tmp_path, kwargs, named):
    evaluate(tmp_path)
    with pytest.raises(ValueError, match=f"nll.npz: belongs to an evaluation of other settings: {named}"):
        evaluate(tmp_path, resume=True, **kwargs)


def test_other_weights_are_refused(tmp_path):
    class Network(torch.nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    model = Network(1, 1, 1)
    evaluate(tmp_path, model=model)
    with torch.no_grad():
        model.bias += 1
    with pytest.raises(ValueError, match="other settings: weights_sha256="):
        evaluate(tmp_path, model=model, resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no archive"])
def test_a_file_that_is_none_is_named(tmp_path, content):
    (tmp_path / "nll.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"nll.npz: not the arrays of an evaluation"):
        evaluate(tmp_path, resume=True)


def test_the_estimate_resumes_too(tmp_path):
    process, images = small_process(), gaussian_images(10, LEVELS)
    model = Stopping(process)
    whole = estimate_eps_mean_square(model, process, images, batch_size=16)
    model.calls, model.error = 0, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt, match="interrupted after 80 of 500 terms"):
        estimate_eps_mean_square(model, process, images, batch_size=16, output=tmp_path)
    again = {"batch_size": 16, "output": tmp_path, "resume": True}
    np.testing.assert_array_equal(estimate_eps_mean_square(model, process, images, **again), whole)
    with pytest.raises(ValueError, match=r"eps_mean_square.npz: belongs to .*: seed=0, not 3"):
        estimate_eps_mean_square(model, process, images, seed=3, **again)
