"""Every command from end to end, and what a user sees when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import diffkern
from diffkern.cli import main
from diffkern.cli.sample import SOLVER_OPTIONS, SampleCommand
from diffkern.models import load_model
from diffkern.solvers import SOLVERS
from diffkern.training.checkpoint import list_checkpoints, read_weights

TINY = ["--model.channels", "8", "--model.channel-mult", "1", "--model.num-res-blocks", "1", "--model.num-groups", "4"]
QUICK = [*TINY, "--batch-size", "8", "--process.num-timesteps", "50", "--no-progress"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(folder, *flags):
    return main(["train", "--output", str(folder), *QUICK, *flags])


def newest_weights(folder):
    return read_weights(list_checkpoints(folder)[-1] / "model.safetensors")


def test_train_resume_and_sample_digits(tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(run, "--steps", "3", "--model.dropout", "0.1", "--process.prediction", "v") == 0
    assert "1,541 images (1, 8, 8), 10 classes" in capsys.readouterr().out
    stored = json.loads((run / "config.json").read_text())
    assert stored["train"]["steps"] == 3
    assert stored["process"]["prediction"] == "v"

    # All that is not given again comes from config.json: the weights are those of one run of five steps.
    assert main(["train", "--output", str(run), "--steps", "5", "--resume"]) == 0
    assert train(whole, "--steps", "5", "--model.dropout", "0.1", "--process.prediction", "v") == 0
    resumed = newest_weights(run)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in newest_weights(whole).items())

    sample = ["sample", str(run), "--n", "6", "--labels", "7", "3", "--steps", "4", "--seed", "5", "--guidance", "2"]
    assert main([*sample, "--output", str(tmp_path / "deep" / "a.b")]) == 0
    assert main([*sample, "--output", str(tmp_path / "c"), "--batch-size", "4"]) == 0
    with np.load(tmp_path / "deep" / "a.b.npz") as one, np.load(tmp_path / "c.npz") as other:
        assert one["arr_0"].dtype == np.uint8
        assert one["arr_0"].shape == (6, 8, 8, 1)
        assert one["arr_1"].tolist() == [7, 3, 7, 3, 7, 3]
        np.testing.assert_allclose(one["arr_0"].astype(int), other["arr_0"].astype(int), atol=1)
        assert one["arr_0"].std() > 1
        with Image.open(tmp_path / "deep" / "a.b.png") as grid:
            pixels = np.asarray(grid)
        # Two columns of three rows, each pixel six wide, two between: the first image stands in the corner.
        assert pixels.shape == (3 * 50 + 2, 2 * 50 + 2)
        np.testing.assert_array_equal(pixels[2:50:6, 2:50:6], one["arr_0"][0, ..., 0])
        np.testing.assert_array_equal(pixels[102:150:6, 52:100:6], one["arr_0"][5, ..., 0])
    checkpoint = str(list_checkpoints(run)[0])
    assert main(["sample", checkpoint, "--n", "1", "--steps", "50", "--solver", "ddpm", "--weights", "model",
                 "--output", str(tmp_path / "d")]) == 0  # fmt: skip
    assert main([*sample, "--solver", "dpmpp_2m", "--output", str(tmp_path / "e")]) == 0
    with np.load(tmp_path / "e.npz") as multistep, np.load(tmp_path / "c.npz") as ddim:
        assert multistep["arr_0"].shape == ddim["arr_0"].shape
        assert (multistep["arr_0"] != ddim["arr_0"]).any()
    for number, flags in enumerate([
        ["--solver", "euler", "--sigmas", "karras", "--threshold", "0.99", "2.0"],
        ["--solver", "heun", "--s-churn", "3", "--s-min", "0.1", "--s-noise", "1.01"],
        ["--solver", "deis", "--order", "2", "--spacing", "trailing"],
        ["--solver", "ddim", "--eta", "1.0", "--spacing", "leading", "--steps-offset", "1"],
    ]):  # fmt: skip
        assert main([*sample, *flags, "--output", str(tmp_path / f"flags{number}")]) == 0
        with np.load(tmp_path / f"flags{number}.npz") as given, np.load(tmp_path / "c.npz") as ddim:
            assert (given["arr_0"] != ddim["arr_0"]).any()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--process.variance", "learned_range", "--self-conditioning", "0.5", "--offset-noise", "0.1"],
            {"learn_sigma": True, "self_condition": True},
        ),
        (["--process.prediction", "x_prev", "--loss", "kl"], {"learn_sigma": False, "self_condition": False}),
        (
            ["--process.prediction", "flow", "--process.variance", "learned", "--loss", "hybrid",
             "--weighting", "min_snr", "--weighting-gamma", "3"],
            {"learn_sigma": True, "self_condition": False},
        ),
    ],
)  # fmt: skip
def test_train_what_else_there_is_to_learn_and_sample_it(tmp_path, flags, expected):
    """The network follows the flags; a resumed run has them again, and the weights of one that was not stopped."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(run, "--steps", "3", *flags) == 0
    assert main(["train", "--output", str(run), "--steps", "5", "--resume"]) == 0
    assert train(whole, "--steps", "5", *flags) == 0
    resumed = newest_weights(run)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in newest_weights(whole).items())
    model = load_model(list_checkpoints(run)[-1] / "ema.safetensors")
    assert {name: getattr(model.config, name) for name in expected} == expected
    sample = ["sample", str(run), "--n", "4", "--steps", "4", "--guidance", "2"]
    for solver in ("ddim", "ddpm", "heun"):
        assert main([*sample, "--solver", solver, "--output", str(tmp_path / solver)]) == 0
        with np.load(tmp_path / f"{solver}.npz") as images:
            assert images["arr_0"].shape == (4, 8, 8, 1)


def test_the_digits_that_are_evaluated_are_left_out_unless_asked_for(tmp_path, capsys):
    for split, count in (("heldout", "256"), ("train", "1,541"), ("all", "1,797")):
        assert train(tmp_path / split, "--steps", "1", "--split", split) == 0
        assert f"{count} images" in capsys.readouterr().out
    # A run from before there was a choice had them all, and goes on with them.
    configuration = tmp_path / "all" / "config.json"
    values = json.loads(configuration.read_text())
    del values["split"]
    configuration.write_text(json.dumps(values))
    assert main(["train", "--output", str(tmp_path / "all"), "--steps", "2", "--resume"]) == 0
    assert "1,797 images" in capsys.readouterr().out


def test_train_on_a_folder_without_labels_and_sample(tmp_path, capsys):
    for index in range(3):
        Image.new("RGB", (9, 9), (index * 90, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_text("no image")
    flags = ["--data", str(tmp_path), "--image-size", "4", "--steps", "1"]
    assert train(tmp_path / "run", *flags) == 0
    captured = capsys.readouterr()
    assert "3 images (3, 4, 4), no labels" in captured.out
    assert "warning: " in captured.err
    assert "broken.png: skipped" in captured.err
    assert "1 of 4 image files could not be read" in captured.err
    assert main(["sample", str(tmp_path / "run"), "--n", "5", "--steps", "2", "--output", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out.npz") as samples:
        assert samples.files == ["arr_0"]
        assert samples["arr_0"].shape == (5, 4, 4, 3)
    # What sample writes, train reads.
    assert train(tmp_path / "again", "--data", str(tmp_path / "out.npz"), "--steps", "1") == 0
    assert main(["sample", str(tmp_path / "run"), "--labels", "1"]) == 1
    assert "--labels: this network has no classes" in capsys.readouterr().err


def test_info_names_every_op_and_backend(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (diffkern.__version__, torch.__version__, "reference", "native", "triton", "q_sample", "group_norm"):
        assert word in out


def test_errors_are_one_message_without_a_traceback(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert train(run, "--steps", "1", "--label-dropout", "0") == 0
    cases = [
        (["train", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "x")], "neither 'digits' nor"),
        (["train", "--output", str(run)], "holds checkpoints up to step_00000001"),
        (["train", "--steps", "0"], "steps=0: it must be 1 or more"),
        (["train", "--model.num-classes", "3"], "it follows the data"),
        (["train", "--model.learn-sigma"], "it follows --process.variance"),
        (["train", "--model.no-self-condition"], "it follows --self-conditioning"),
        (["train", "--weighting-gamma", "2"], "weighting_gamma=2.0: it must be None without a weighting"),
        (
            ["train", "--output", str(tmp_path / "x"), "--process.variance", "learned", "--loss", "mse"],
            "loss='mse' does not train the variance",
        ),
        (["train", "--resume", "--output", str(run), "--loss", "kl"], "its run had loss='mse', this one has 'kl'"),
        # What was refused has not become the run's configuration.
        (["train", "--resume", "--output", str(run), "--seed", "1"], "its run had seed=0, this one has 1"),
        (
            ["train", "--resume", "--output", str(run), "--process.schedule", "cosine"],
            "its run had another noise schedule",
        ),
        (
            ["train", "--resume", "--output", str(run), "--process.num-timesteps", "60"],
            "its run had num_timesteps=50, this one has 60",
        ),
        (["train", "--resume", "--output", str(run), "--split", "all"], "its run had images=1541, this one has 1797"),
        (["train", "--data", str(tmp_path), "--split", "all"], "only the digits have splits"),
        (["train", "--output", "None"], "--output: a folder is needed"),
        (
            ["train", "--resume", "--output", str(run), "--model.channels", "16"],
            "model.safetensors: not a state of this",
        ),
        (["sample", str(tmp_path)], "neither a checkpoint nor"),
        (["sample", str(run), "--n", "0"], "--n 0: it must be"),
        (["sample", str(run), "--n", "1", "--guidance", "3"], "trained without label dropout"),
        (["sample", str(run), "--n", "1", "--labels", "10"], "labels must be in [0, 10)"),
        (["sample", str(run), "--solver", "dpm"], "solver is 'dpm'; it may be one of 'ddpm', 'ddim'"),
        (["sample", str(run), "--order", "2"], "order is 2; the solver 'ddim' takes eta"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert main(arguments) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"diffkern {arguments[0]}: error: ")
        assert message in error
        assert "Traceback" not in error
    monkeypatch.setenv("DIFFKERN_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["sample", str(tmp_path)])


def test_usage(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    assert "usage: diffkern COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == diffkern.__version__
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong:
        main(["train", "--no-such-flag"])
    assert wrong.value.code == 2


def test_importing_the_command_line_imports_nothing_heavy():
    code = "import sys, diffkern.cli; sys.exit(bool({'tyro', 'rich', 'accelerate', 'tqdm', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ctrl_c_saves_says_where_and_shows_no_traceback(tmp_path):
    command = [sys.executable, "-m", "diffkern", "train", "--output", str(tmp_path), *QUICK, "--checkpoint-every", "1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 60
        while not list_checkpoints(tmp_path):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    newest = list_checkpoints(tmp_path)[-1]
    assert process.returncode == 130
    assert f"saved to {newest}" in error
    assert "Traceback" not in error


def test_every_option_of_a_solver_is_a_flag():
    options = {option for solver in SOLVERS.values() for option in solver.options}
    assert options == {"eta", *SOLVER_OPTIONS}
    assert options <= set(SampleCommand.__dataclass_fields__)
