"""``diffkern evaluate nll`` from a training run to its files, and what it says when something is wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern.cli import main
from diffkern.evaluation import evaluate_nll
from diffkern.models import load_model
from diffkern.training import Digits, find_checkpoint
from diffkern.training.checkpoint import read_process

TINY = ["--model.channels", "8", "--model.channel-mult", "1", "--model.num-res-blocks", "1", "--model.num-groups", "4"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training run of three steps."""
    folder = tmp_path_factory.mktemp("training") / "run"
    flags = ["--batch-size", "8", "--process.num-timesteps", "50", "--steps", "3", "--no-progress"]
    assert main(["train", "--output", str(folder), *TINY, *flags]) == 0
    return folder


def evaluate(run, output, *flags):
    return main(["evaluate", "nll", str(run), "--output", str(output), "--no-progress", *flags])


def test_digits(run, tmp_path, capsys):
    flags = ["--images", "12", "--levels", "17", "--seed", "3"]
    assert evaluate(run, tmp_path / "a", *flags) == 0
    out = capsys.readouterr().out
    assert "12 images of digits, split heldout at 17 grey levels" in out
    result = json.loads((tmp_path / "a" / "nll.json").read_text())
    assert f"{result['bits_per_dim']:.4f} bits/dim, 95 % confidence {result['confidence_95'][0]:.4f} to" in out
    assert (tmp_path / "a" / "nll.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["images"] == 12

    # The same from Python: the averaged weights, every 21st of the 256 images that are kept out, their labels.
    checkpoint = find_checkpoint(run)
    data = torch.utils.data.Subset(Digits("heldout"), [i * 256 // 12 for i in range(12)])
    own = evaluate_nll(load_model(checkpoint / "ema.safetensors"), read_process(checkpoint)[0], data, levels=17, seed=3)
    assert own.to_json() == result
    with np.load(tmp_path / "a" / "nll.npz") as arrays:
        np.testing.assert_array_equal(arrays["vb"], own.vb)

    assert evaluate(run, tmp_path / "a", *flags, "--resume") == 0
    assert json.loads((tmp_path / "a" / "nll.json").read_text()) == result


def test_steps_variances_weights_and_splits(run, tmp_path, capsys):
    flags = ["--images", "4", "--steps", "10", "--levels", "17"]
    found = {}
    for name, more in {
        "small": [],
        "large": ["--variance", "fixed_large"],
        "analytic": ["--variance", "analytic", "--analytic-images", "16"],
        "model": ["--weights", "model"],
        "train": ["--split", "train"],
        "unclipped": ["--no-clip"],
        "draws": ["--draws", "2"],
    }.items():
        assert evaluate(run, tmp_path / name, *flags, *more) == 0
        found[name] = json.loads((tmp_path / name / "nll.json").read_text())
        assert len(found[name]["vb"]) == 10
    assert "the analytic variance is estimated on 16 images of digits, split train" in capsys.readouterr().out
    assert len({result["bits_per_dim"] for result in found.values()}) == len(found)
    assert found["analytic"]["settings"]["variance"] == "analytic"
    # What the estimate cost is not paid twice.
    analytic = ["--variance", "analytic", "--analytic-images", "16", "--resume"]
    assert evaluate(run, tmp_path / "analytic", *flags, *analytic) == 0
    assert json.loads((tmp_path / "analytic" / "nll.json").read_text()) == found["analytic"]


def test_a_folder_with_one_image(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (9, 9), (index * 90, 0, 0)).save(folder / f"{index}.png")
    flags = ["--image-size", "4", "--steps", "1", "--process.num-timesteps", "50", "--no-progress"]
    assert main(["train", "--output", str(tmp_path / "run"), *TINY, "--data", str(folder), *flags]) == 0
    assert evaluate(tmp_path / "run", tmp_path / "out", "--data", str(folder), "--images", "1") == 0
    assert "bits/dim for one image" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "nll.json").read_text())
    assert result["settings"]["levels"] == 256
    assert result["standard_error"] is None


def test_errors_are_one_message(run, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "nll.npz").touch()
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "folder" / "0.png")
    cases = [
        (["--split", "train", "--data", str(tmp_path / "folder")], "only the digits have splits"),
        (["--analytic-data", "digits"], "--analytic-data digits: it needs --variance analytic"),
        (["--levels", "0"], "levels is 0; it must be at least 2"),
        (["--images", "0"], "--images 0: it must be from 1 to 256"),
        (["--images", "257"], "--images 257"),
        (["--data", str(tmp_path / "folder")], "image 0 of the data has no label; the model takes 0 to 9"),
        (["--data", str(tmp_path / "none")], "neither 'digits' nor"),
        (["--steps", "51"], "steps is 51"),
        (["--levels", "1"], "levels is 1"),
        (["--variance", "analytic", "--analytic-images", "0"], "--analytic-images 0"),
    ]
    capsys.readouterr()
    for flags, message in cases:
        assert evaluate(run, tmp_path / "out", *flags) == 1, flags
        error = capsys.readouterr().err
        assert error.startswith("diffkern evaluate: error: ")
        assert message in error
    assert evaluate(run, tmp_path / "old") == 1
    assert "holds an earlier evaluation: --resume, or another --output" in capsys.readouterr().err
    assert evaluate(tmp_path, tmp_path / "out") == 1
    assert "neither a checkpoint nor" in capsys.readouterr().err
    assert main(["evaluate", "fid"]) == 1
    assert "no evaluation 'fid'" in capsys.readouterr().err
    assert main(["evaluate"]) == 0
    assert "nll" in capsys.readouterr().out


def test_a_learned_variance(tmp_path, capsys):
    flags = ["--batch-size", "8", "--process.num-timesteps", "50", "--steps", "1", "--no-progress"]
    learned = ["--process.variance", "learned_range"]
    assert main(["train", "--output", str(tmp_path / "run"), *TINY, *flags, *learned]) == 0
    assert evaluate(tmp_path / "run", tmp_path / "out", "--images", "2") == 0
    result = json.loads((tmp_path / "out" / "nll.json").read_text())
    # What the data know of themselves.
    assert (result["settings"]["variance"], result["settings"]["levels"]) == ("learned_range", 17)
    assert evaluate(tmp_path / "run", tmp_path / "other", "--variance", "fixed_small") == 1
    assert "--variance fixed_small: this network has learned its variance" in capsys.readouterr().err
