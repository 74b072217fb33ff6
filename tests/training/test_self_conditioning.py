"""Training with self-conditioning: when the network is given its own x0, which, and that every split does the same."""

import pytest
import torch
from training_cases import CLASSES, Conditioned, assert_same, tiny_loss, tiny_process, tiny_trainer

from diffkern.models import CheckpointError, UNet, UNetConfig
from diffkern.ops import philox_uint32


def chosen(step, probability, seed=3):
    return int(philox_uint32((1, 3), seed, draw=step, stream=4)[0, 2]) < probability * 2**32


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev", "flow"])
def test_the_network_is_given_the_x0_of_a_pass_without_gradients(prediction, variance):
    process = tiny_process(prediction=prediction, variance=variance)
    loss = tiny_loss(process, self_conditioning=0.5)
    x0 = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    calls = []

    def model(x_t, t, **given):
        output = 0.7 * torch.tanh(3 * x_t).repeat(1, 1 if variance == "fixed_small" else 2, 1, 1)
        calls.append((x_t, t, given, torch.is_grad_enabled(), output))
        return output.requires_grad_() if torch.is_grad_enabled() else output

    counts = {}
    for step in range(8):
        calls.clear()
        loss(model, x0, torch.zeros(5), step, torch.arange(5))
        counts[step] = len(calls)
        *first, (x_t, t, given, enabled, _) = calls
        assert enabled
        if not first:
            assert given == {}
            continue
        ((before, at, nothing, recorded, output),) = first
        assert not recorded
        assert nothing == {}
        assert torch.equal(before, x_t)
        assert torch.equal(at, t)
        expected = process.convert(x_t.double().numpy(), output[:, :1].double().numpy(), t.numpy(), prediction, "x0")
        torch.testing.assert_close(
            given["x_self_cond"].double(), torch.from_numpy(expected).clamp(-1, 1), rtol=1e-5, atol=1e-5
        )
    assert counts == {step: 1 + chosen(step, 0.5) for step in range(8)}
    assert {1, 2} == set(counts.values())


def test_the_share_of_the_steps():
    calls = []

    def model(x_t, t, **given):
        calls.append(1)
        return x_t

    x0, steps = torch.zeros(1, 1, 2, 2), 400
    for probability, share in ((0.25, 0.25), (1.0, 1.0)):
        calls.clear()
        loss = tiny_loss(self_conditioning=probability)
        for step in range(steps):
            loss(model, x0, torch.zeros(1), step, torch.arange(1))
        # Four standard deviations.
        assert abs(len(calls) / steps - 1 - share) <= 4 * (share * (1 - share) / steps) ** 0.5


def test_the_gradient_is_that_of_the_second_pass_alone():
    """The weights' gradients equal those of a network that is given the x0 as data."""
    loss, step = tiny_loss(null_label=CLASSES, self_conditioning=1.0), 5
    net = Conditioned(dropout=0)
    x0, labels, samples = torch.rand(6, 1, 4, 4) * 2 - 1, torch.arange(6) % CLASSES, torch.arange(6)
    found = torch.autograd.grad(loss(net, x0, labels, step, samples), list(net.parameters()))
    known = []

    def model(x_t, t, y, x_self_cond=None):
        known.append(x_self_cond)
        return net(x_t, t, y, x_self_cond)

    loss(model, x0, labels, step, samples)
    plain = tiny_loss(null_label=CLASSES)
    value = plain(lambda x_t, t, y: net(x_t, t, y, known[-1]), x0, labels, step, samples)
    expected = torch.autograd.grad(value, list(net.parameters()))
    assert known[0] is None
    assert expected[-4].abs().max() > 0
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_accumulation_and_splits_train_on_the_same():
    weights = []
    for accumulation in (1, 4):
        trainer = tiny_trainer(
            model=Conditioned(dropout=0), steps=6, accumulation=accumulation, self_conditioning=0.5, offset_noise=0.2
        )
        weights.append((trainer.fit().losses, trainer.model.state_dict()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    for name, tensor in weights[0][1].items():
        torch.testing.assert_close(tensor, weights[1][1][name], rtol=1e-4, atol=1e-6)


def test_autocast_keeps_the_gradients_after_a_pass_without():
    """A weight cast to bfloat16 in the pass without gradients must not serve the one with them."""
    model = Conditioned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny_trainer(model=model, steps=2, mixed_precision="bf16", self_conditioning=1.0).fit()
    assert all((tensor != before[name]).any() for name, tensor in model.state_dict().items())


def test_resuming_is_bit_for_bit_and_of_the_same_objective(tmp_path):
    given = {
        "self_conditioning": 0.5,
        "offset_noise": 0.1,
        "weighting": "min_snr",
        "process": tiny_process(variance="learned_range"),
    }

    def trainer(folder, steps, **changes):
        model = Conditioned(out_channels=2)
        return tiny_trainer(tmp_path / folder, model=model, steps=steps, checkpoint_every=2, **{**given, **changes})

    whole = trainer("whole", 7)
    everything = whole.fit()
    trainer("parts", 4).fit()
    torch.manual_seed(999)
    parts = trainer("parts", 7)
    resumed = parts.fit(resume=True)
    assert resumed.losses == everything.losses
    assert_same(whole.model.state_dict(), parts.model.state_dict())
    for change, message in [
        ({"loss": "hybrid"}, "its run had loss='rescaled_mse', this one has 'hybrid'"),
        ({"levels": 9}, "its run had levels=256, this one has 9"),
        ({"weighting": None}, "its run had weighting='min_snr', this one has None"),
        ({"weighting_gamma": 2.0}, r"its run had weighting_options=\{\}, this one has \{'gamma': 2.0\}"),
        ({"offset_noise": 0.0}, "its run had offset_noise=0.1, this one has 0.0"),
        ({"self_conditioning": 1.0}, "its run had self_conditioning=0.5, this one has 1.0"),
        ({"process": tiny_process(variance="learned")}, "its run had variance='learned_range', this one has 'learned'"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            trainer("parts", 8, **change).fit(resume=True)


def test_a_unet_that_is_never_given_its_x0_is_refused():
    model = UNet(UNetConfig(1, 8, (1,), 1, num_groups=4, self_condition=True))
    with pytest.raises(ValueError, match=r"self_conditioning=0\.0 and a model with self_condition"):
        tiny_trainer(model=model)
    tiny_trainer(model=model, self_conditioning=0.5, steps=2).fit()
