"""What a run computes: accumulation, warm-up, average, several processes, resuming."""

import os
from dataclasses import replace

import pytest
import torch
from training_cases import CLASSES, Conditioned, TinyNet, assert_same, processes, tiny_data, tiny_process, tiny_trainer

from diffkern.models import CheckpointError, UNet, UNetConfig
from diffkern.training import TrainConfig
from diffkern.training.checkpoint import list_checkpoints, read_training_state, read_weights

# --- the run


def test_the_loss_falls_and_the_model_is_left_as_it_was():
    model = TinyNet(dropout=0).eval()
    state = torch.get_rng_state()
    grey = [(torch.full((1, 4, 4), 0.7), 0)]
    result = tiny_trainer(model=model, data=grey, steps=150, process=tiny_process(prediction="x0")).fit()
    assert len(result.losses) == 150
    assert sum(result.losses[-20:]) < 0.1 * sum(result.losses[:20])
    assert result.checkpoint is None
    assert result.images_per_second > 0
    assert not model.training
    assert not result.ema.training
    assert torch.equal(state, torch.get_rng_state())


def test_accumulation_trains_on_the_same_batch():
    weights = []
    for accumulation in (1, 4):
        trainer = tiny_trainer(model=seeded_net(dropout=0), steps=6, accumulation=accumulation)
        losses = trainer.fit().losses
        weights.append((losses, trainer.model.state_dict()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    for name, tensor in weights[0][1].items():
        torch.testing.assert_close(tensor, weights[1][1][name], rtol=1e-4, atol=1e-6)


def test_workers_change_nothing():
    plain, loaded = tiny_trainer(steps=3), tiny_trainer(steps=3, workers=1)
    assert plain.fit().losses == loaded.fit().losses
    assert_same(plain.model.state_dict(), loaded.model.state_dict())


def test_precision_is_that_of_each_run():
    dtypes = []
    model = seeded_net()
    model.last.register_forward_hook(lambda module, given, out: dtypes.append((out.dtype, module.weight.dtype)))
    for precision in ("no", "bf16", "no"):
        tiny_trainer(model=model, steps=1, mixed_precision=precision).fit()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).dtype == torch.float32
    full, half = (torch.float32, torch.float32), (torch.bfloat16, torch.float32)
    assert dtypes == [full, half, full, full]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU"):
            tiny_trainer(model=model, steps=1, mixed_precision="fp16").fit()


def test_warmup_and_average():
    start = seeded_net().state_dict()
    one, two = tiny_trainer(steps=1, lr=1e-2, warmup_steps=4), tiny_trainer(steps=2, lr=1e-2, warmup_steps=4)
    averaged_one, averaged_two = one.fit().ema, two.fit().ema
    # Adam's first step is as long as the learning rate wherever there is a gradient.
    moved = (one.model.last.weight - start["last.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 / 4), rtol=1e-3, atol=0)
    assert_same(averaged_one.state_dict(), one.model.state_dict())
    expected = torch.lerp(one.model.last.weight, two.model.last.weight, 1 - 2 / 11)
    torch.testing.assert_close(averaged_two.last.weight, expected)


@pytest.mark.parametrize("network", ["tiny", "unet"])
def test_resuming_in_an_epoch_is_bit_for_bit(tmp_path, network):
    def model():
        torch.manual_seed(2)
        config = UNetConfig(1, 8, (1, 2), 1, num_groups=4, dropout=0.2, num_classes=CLASSES, null_label=True)
        return TinyNet() if network == "tiny" else UNet(config)

    whole = tiny_trainer(tmp_path / "whole", model=model(), steps=9, checkpoint_every=2)
    everything = whole.fit()
    tiny_trainer(tmp_path / "parts", model=model(), steps=4).fit()  # 32 of 20 images: in the second epoch
    torch.manual_seed(999)
    parts = tiny_trainer(tmp_path / "parts", model=model(), steps=9)
    resumed = parts.fit(resume=True)
    assert resumed.losses == everything.losses
    assert_same(whole.model.state_dict(), parts.model.state_dict())
    assert_same(everything.ema.state_dict(), resumed.ema.state_dict())
    one, other = (read_training_state(result.checkpoint) for result in (everything, resumed))
    for key, values in one["optimizer"]["state"].items():
        assert_same(values, other["optimizer"]["state"][key])
    assert torch.equal(one["generators"][0]["cpu"], other["generators"][0]["cpu"])


def test_a_second_run_needs_resume_or_another_folder(tmp_path):
    tiny_trainer(tmp_path, steps=1).fit()
    with pytest.raises(FileExistsError, match="holds checkpoints up to step_00000001"):
        tiny_trainer(tmp_path, steps=1).fit()
    again = tiny_trainer(tmp_path, steps=1).fit(resume=True)
    assert again.checkpoint == list_checkpoints(tmp_path)[-1]
    assert len(again.losses) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "its run had seed=0, this one has 1"),
        ({"batch_size": 4}, "its run had batch_size=8, this one has 4"),
        ({"data": tiny_data(19)}, "its run had images=20, this one has 19"),
        ({"model": TinyNet(width=5)}, r"first.weight is \(4, 1, 3, 3\), the model's is \(5, 1, 3, 3\)"),
    ],
)
def test_resuming_something_else(tmp_path, change, message):
    tiny_trainer(tmp_path, steps=1).fit()
    with pytest.raises(CheckpointError, match=message):
        tiny_trainer(tmp_path, steps=2, **change).fit(resume=True)


# --- what is refused before it begins


def test_refused_at_construction():
    config = UNetConfig(1, 8, (1,), 1, num_groups=4, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"label_dropout=0\.3 needs a model with a null label"):
        tiny_trainer(model=UNet(config))
    tiny_trainer(model=UNet(config), label_dropout=0)
    with pytest.raises(ValueError, match="has no label"):
        tiny_trainer(model=UNet(replace(config, null_label=True)), data=[torch.zeros(1, 4, 4)])
    with pytest.raises(ValueError, match="dataset is empty"):
        tiny_trainer(data=torch.utils.data.TensorDataset(torch.zeros(0, 1, 4, 4)))


@pytest.mark.parametrize(
    "field",
    [
        {"steps": 0},
        {"batch_size": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"ema_decay": 1.0},
        {"label_dropout": -0.1},
        {"mixed_precision": "fp8"},
        {"seed": 2**64},
        {"keep_checkpoints": 0},
    ],
)
def test_config_names_the_field(field):
    name = next(iter(field))
    with pytest.raises(ValueError, match=f"{name}="):
        TrainConfig(**field)


# --- several processes


def seeded_net(**kwargs):
    torch.manual_seed(1)
    return TinyNet(**kwargs)


# What draws numbers of its own in a step.
SWITCHES = {"self_conditioning": 0.5, "offset_noise": 0.2, "weighting": "min_snr"}


def train_as_rank(rank, port, output):
    torch.set_num_threads(1)
    os.environ.update(
        ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tiny_trainer(output, model=Conditioned(dropout=0), steps=6, accumulation=2, **SWITCHES).fit()
    torch.distributed.destroy_process_group()


def test_two_processes_train_on_the_same_batch(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=train_as_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    alone = tiny_trainer(model=Conditioned(dropout=0), steps=6, **SWITCHES)
    losses = alone.fit().losses
    checkpoint = list_checkpoints(tmp_path)[-1]
    state = read_training_state(checkpoint)
    assert losses == pytest.approx(state["losses"].tolist(), rel=1e-5)
    assert len(state["generators"]) == 2
    for name, tensor in read_weights(checkpoint / "model.safetensors").items():
        torch.testing.assert_close(tensor, alone.model.state_dict()[name], rtol=1e-4, atol=1e-6)
