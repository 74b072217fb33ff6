import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffkern.models import CheckpointError, load_model, load_state, save_model
from tests.models.small import GUIDED, PLAIN, small_model


@pytest.fixture
def saved(tmp_path):
    model = small_model(**PLAIN)
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    return path, model


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_self_conditioned_network_comes_back(tmp_path):
    model = small_model(**PLAIN, self_condition=True).eval()
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors").eval()
    assert loaded.self_condition
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    assert torch.equal(loaded(x, t, y, x), model(x, t, y, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path, dtype, memory_format):
    model = small_model(**GUIDED).to(dtype, memory_format=memory_format)
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    before = torch.get_rng_state()
    loaded = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == model.config
    assert states_equal(loaded, model)
    x, t, y = torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor([3, 700]), torch.tensor([0, 2])
    loaded = loaded.to(memory_format=memory_format)
    assert torch.equal(loaded.eval()(x, t, y), model.eval()(x, t, y))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_loaded_model_does_not_depend_on_its_file(saved):
    path, model = saved
    loaded = load_model(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert states_equal(loaded, model)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file \(\d+ bytes\)"):
        load_model(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_model(tmp_path / "absent.safetensors")


def test_file_of_something_else(tmp_path, saved):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: not written by"):
        load_model(path)

    with safe_open(saved[0], "pt") as file:
        metadata = file.metadata()
    config = {**json.loads(metadata["config"]), "num_groups": 0}
    save_file({"weight": torch.zeros(2)}, path, {**metadata, "config": json.dumps(config)})
    with pytest.raises(CheckpointError, match="configuration cannot be used: num_groups must be at least 1"):
        load_model(path)


def test_state_of_another_architecture_is_described_and_changes_nothing():
    model, other = small_model(), small_model(channels=32, channel_mult=(1, 1, 1), attention_resolutions=(1,))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(model, other.state_dict(), "run/ema.safetensors")
    message = str(caught.value)
    missing = before.keys() - other.state_dict().keys()
    unexpected = other.state_dict().keys() - before.keys()
    assert "run/ema.safetensors: not a state of this UNet" in message
    assert f"{len(missing)} missing: " in message
    assert f"{len(unexpected)} unexpected: " in message
    assert f"… and {len(unexpected) - 5} more" in message
    assert "time_mlp.0.weight is (128, 32), the model's is (64, 16)" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_wrong_key_is_named():
    model = small_model()
    state = model.state_dict()
    state["conv_uot.bias"] = state.pop("conv_out.bias")
    with pytest.raises(CheckpointError, match=r"1 missing: conv_out.bias\n  1 unexpected: conv_uot.bias$"):
        load_state(model, state, "here")


def test_a_state_that_fits_is_loaded():
    model, other = small_model(), small_model()
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    load_state(model, other.state_dict(), "here")
    assert states_equal(model, other)


def test_only_a_bare_unet_can_be_saved(tmp_path):
    wrapped = torch.nn.DataParallel(small_model())
    with pytest.raises(TypeError, match=r"model must be a diffkern\.models\.UNet, not DataParallel"):
        save_model(tmp_path / "model.safetensors", wrapped)


FULL_DISK = """
import resource, sys
from diffkern.models import UNet, UNetConfig, save_model
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_model(sys.argv[1], UNet(UNetConfig(3, 16, (1, 2), 1, num_groups=4)))
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(saved):
    path, model = saved
    said = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True).stdout
    assert f"{path}: cannot be written" in said
    assert states_equal(load_model(path), model)
    assert list(path.parent.iterdir()) == [path]


SAVE_FOREVER = """
import sys
from diffkern.models import load_model, save_model
model = load_model(sys.argv[1])
print("ready", flush=True)
while True:
    save_model(sys.argv[1], model)
"""


def test_killed_while_saving_the_file_is_whole(saved):
    path, model = saved
    saver = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert saver.stdout.readline() == "ready\n"
        inodes, deadline = set(), time.monotonic() + 1
        while time.monotonic() < deadline:  # a reader never sees half of a file either
            assert states_equal(load_model(path), model)
            inodes.add(path.stat().st_ino)
    finally:
        saver.kill()
        saver.wait()
        saver.stdout.close()
    assert len(inodes) > 1
    assert states_equal(load_model(path), model)
