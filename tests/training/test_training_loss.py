"""The loss of a step: targets, kinds, weightings and offset noise against a plain composition in float64; counters."""

import itertools
import math

import numpy as np
import pytest
import torch
from training_cases import CLASSES, tiny_loss, tiny_process, tiny_trainer

from diffkern.models import UNet, UNetConfig
from diffkern.ops import philox_normal
from diffkern.process import GaussianProcess, linear_betas, loss_weights, zero_terminal_snr
from diffkern.training import Digits, TrainConfig

COUNT, STEP, SEED = 24, 7, 3
PREDICTIONS = ("eps", "x0", "v", "x_prev", "flow")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def images(count=COUNT):
    """17 grey levels, the ends among them."""
    return torch.randint(0, 17, (count, 2, 4, 4), generator=torch.Generator().manual_seed(0)) / 8.0 - 1.0


def at(table, t):
    return torch.from_numpy(np.array(table))[t].reshape(-1, 1, 1, 1)


def step(loss, x0, learned=False, samples=None, dtype=torch.float32):
    """(value, gradient of the output, output, t, x_t) of one micro-batch through a network that is a leaf."""
    seen = {}

    def model(x_t, t):
        noise = torch.randn(len(x_t), 2 * (1 + learned), 4, 4, generator=torch.Generator().manual_seed(9))
        noise[:, 2:] *= 0.5
        mean = torch.cat([0.3 * torch.tanh(x_t)] * (1 + learned), dim=1)
        seen.update(t=t, x_t=x_t, output=(mean + 0.1 * noise).to(dtype).requires_grad_())
        return seen["output"]

    value = loss(model, x0, torch.zeros(len(x0)), STEP, torch.arange(len(x0)) if samples is None else samples)
    (gradient,) = torch.autograd.grad(1024 * value, seen["output"])
    return value, gradient, seen["output"], seen["t"], seen["x_t"]


def cdf(x):
    """Of a normal variable, approximately (Page 1977), as OpenAI's decoder has it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bits_per_dim(process, mean, log_variance, x0, x_t, t, levels):
    """The bound's term of each sample, as Ho et al. print it: the KL of two Gaussians, at t = 0 the decoder."""
    true_mean = at(process.posterior_mean_coef1, t) * x0 + at(process.posterior_mean_coef2, t) * x_t
    true = at(process.posterior_log_variance_clipped, t)
    kl = 0.5 * (log_variance - true - 1 + (true - log_variance).exp() + (true_mean - mean) ** 2 / log_variance.exp())
    inverse = (-0.5 * log_variance).exp()
    half = 1 / (levels - 1)
    above, below = cdf(inverse * (x0 - mean + half)), cdf(inverse * (x0 - mean - half))
    likelihood = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    decoder = -likelihood.clamp_min(1e-12).log()
    return torch.where(t.reshape(-1, 1, 1, 1) == 0, decoder, kl).flatten(1).mean(1) / math.log(2)


def composed(process, output, x0, x_t, eps, t, kind, levels=17, weighting=None):
    """The loss in float64, from the definitions; autograd differentiates it."""
    x0, m = x0.double(), output[:, :2]
    s, sigma = at(process.sqrt_alphas_cumprod, t), at(process.sqrt_one_minus_alphas_cumprod, t)
    c1, c2 = at(process.posterior_mean_coef1, t), at(process.posterior_mean_coef2, t)
    target = {"eps": eps, "x0": x0, "v": s * eps - sigma * x0, "x_prev": c1 * x0 + c2 * x_t, "flow": eps - x0}
    mse = ((m - target[process.prediction]) ** 2).flatten(1).mean(1)

    def bound(m):
        predicted = {
            "eps": lambda: (x_t - sigma * m) / s,
            "x0": lambda: m,
            "v": lambda: s * x_t - sigma * m,
            "flow": lambda: (x_t - sigma * m) / (s + sigma),
        }
        mean = m if process.prediction == "x_prev" else c1 * predicted[process.prediction]() + c2 * x_t
        if process.variance == "learned":
            log_variance = output[:, 2:]
        elif process.variance == "learned_range":
            share = (output[:, 2:] + 1) / 2
            least, most = at(process.posterior_log_variance_clipped, t), at(np.log(process.betas), t)
            log_variance = share * most + (1 - share) * least
        else:
            log_variance = at(process.model_log_variance, t).expand_as(m)
        return bits_per_dim(process, mean, log_variance, x0, x_t, t, levels)

    learned = process.variance.startswith("learned")
    factor = {"mse": 0, "hybrid": learned, "rescaled_mse": learned * process.num_timesteps / 1000}.get(kind)
    if factor is None:
        loss = bound(m) * (process.num_timesteps if kind == "rescaled_kl" else 1)
    else:
        loss = mse + factor * bound(m.detach()) if factor else mse
    return (loss if weighting is None else loss * torch.from_numpy(weighting)[t]).mean()


def check(process, found, x0, eps, kind, weighting=None, rtol=2e-5):
    value, gradient, output, t, x_t = found
    s, sigma = at(process.sqrt_alphas_cumprod, t), at(process.sqrt_one_minus_alphas_cumprod, t)
    exact_x_t = s * x0.double() + sigma * eps
    torch.testing.assert_close(x_t, exact_x_t.float(), rtol=1e-6, atol=1e-6)
    leaf = output.detach().double().requires_grad_()
    expected = composed(process, leaf, x0, exact_x_t, eps, t, kind, weighting=weighting)
    (slope,) = torch.autograd.grad(1024 * expected, leaf)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=rtol)
    assert (gradient.double() - slope).abs().max() < rtol * slope.abs().max()


def eps_of(samples=None):
    samples = torch.arange(COUNT) if samples is None else samples
    return philox_normal((COUNT, 2, 4, 4), SEED, draw=STEP, samples=samples, stream=3).double()


KINDS = [
    (variance, kind)
    for variance, kind in itertools.product(VARIANCES, ("mse", "rescaled_mse", "hybrid", "kl", "rescaled_kl"))
    if kind != "mse" or not variance.startswith("learned")
]


@pytest.mark.parametrize(("variance", "kind"), KINDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_kind_of_loss_is_its_definition(prediction, variance, kind):
    """Value and gradient, scaled as a loss scaler does; a process of four steps, so that t = 0 is among them."""
    process = GaussianProcess([0.1, 0.2, 0.4, 0.5], prediction, variance)
    found = step(tiny_loss(process, loss=kind), images(), variance.startswith("learned"))
    assert set(found[3].tolist()) == {0, 1, 2, 3}
    check(process, found, images(), eps_of(), kind)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "given", "options"),
    [
        ("min_snr", {"weighting_gamma": 2.0}, {"gamma": 2.0}),
        ("p2", {"weighting_k": 0.5, "weighting_gamma": 0.7}, {"k": 0.5, "gamma": 0.7}),
        ("edm", {"weighting_sigma_data": 0.3}, {"sigma_data": 0.3}),
        ("laplace", {"weighting_loc": 1.0, "weighting_scale": 2.0}, {"loc": 1.0, "scale": 2.0}),
        ("soft_min_snr", {}, {}),
    ],
)
def test_a_weighting_weighs_each_sample(name, given, options, prediction):
    process = tiny_process(prediction=prediction)
    found = step(tiny_loss(process, weighting=name, **given), images())
    check(process, found, images(), eps_of(), "mse", loss_weights(process, name, **options))


def test_a_weighting_weighs_both_terms_of_a_hybrid_loss():
    process = tiny_process(variance="learned_range")
    found = step(tiny_loss(process, weighting="min_snr"), images(), learned=True)
    check(process, found, images(), eps_of(), "rescaled_mse", loss_weights(process, "min_snr"))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_offset_noise_is_one_number_for_each_channel(prediction, variance):
    process, samples = tiny_process(prediction=prediction, variance=variance), torch.arange(COUNT) + 40
    loss = tiny_loss(process, offset_noise=0.4)
    offset = philox_normal((COUNT, 2), SEED, draw=STEP, samples=samples, stream=7).double()
    eps = eps_of(samples) + 0.4 * offset[:, :, None, None]
    found = step(loss, images(), variance == "learned_range", samples)
    check(process, found, images(), eps, "mse" if variance == "fixed_small" else "rescaled_mse")


def test_a_bfloat16_output_has_its_gradient_rounded_once():
    process = tiny_process(variance="learned_range")
    found = step(tiny_loss(process), images(), learned=True, dtype=torch.bfloat16)
    assert found[1].dtype == torch.bfloat16
    check(process, found, images(), eps_of(), "rescaled_mse", rtol=2.0**-8)


def test_the_loss_has_no_second_derivative():
    factor = torch.tensor(2.0, requires_grad=True)
    value = tiny_loss()(lambda x_t, t: factor**2 * x_t, images(), torch.zeros(COUNT), STEP, torch.arange(COUNT))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, factor, create_graph=True)


def test_draws_depend_on_step_and_position_alone_and_cover_their_ranges():
    seen = []

    def record(x_t, t, y):
        seen.append((x_t, t, y))
        return x_t

    count = 4000
    loss = tiny_loss(null_label=CLASSES, label_dropout=0.25, offset_noise=0.1)
    x0, labels = torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.int64)
    loss(record, x0, labels, 11, torch.arange(count))
    loss(record, x0[:9], labels[:9], 11, torch.arange(9) + 70)
    loss(record, x0, labels, 12, torch.arange(count))
    (x_t, t, y), part, next_step = seen
    assert all(torch.equal(a, b[70:79]) for a, b in zip(part, seen[0], strict=True))
    assert not torch.equal(t, next_step[1])
    assert not torch.equal(y, next_step[2])
    assert torch.bincount(t, minlength=100).min() > 10
    assert t.max() == 99
    # Four standard deviations of a share of 4,000.
    assert abs((y == CLASSES).double().mean() - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    assert abs(x_t[t == 99].std() - 0.8) < 0.2  # √(1 − ᾱ) at the end of a short schedule


def test_defaults_follow_the_variance_and_the_data():
    fixed, learned = tiny_trainer(), tiny_trainer(process=tiny_process(variance="learned"))
    assert (fixed.objective.loss, learned.objective.loss) == ("mse", "rescaled_mse")
    assert fixed.objective.levels == 256
    assert tiny_trainer(levels=5).objective.levels == 5
    model = UNet(UNetConfig.digits())
    assert tiny_trainer(model=model, data=Digits("heldout")).objective.levels == 17


def test_an_output_of_another_shape_is_refused():
    model = UNet(UNetConfig(1, 8, (1,), 1, num_groups=4, learn_sigma=True))
    with pytest.raises(ValueError, match=r"output is \(8, 2, 4, 4\), the images are \(8, 1, 4, 4\)"):
        tiny_trainer(model=model, steps=1).fit()
    model = UNet(UNetConfig(1, 8, (1,), 1, num_groups=4))
    with pytest.raises(ValueError, match=r"\(8, 1, 4, 4\), the images with a variance are \(8, 2, 4, 4\)"):
        tiny_trainer(model=model, steps=1, process=tiny_process(variance="learned")).fit()


@pytest.mark.parametrize(
    ("process", "config", "message"),
    [
        ({"variance": "learned_range"}, {"loss": "mse"}, "loss='mse' does not train the variance"),
        ({}, {"loss": "kl", "weighting": "p2"}, "weighting='p2' and loss='kl': the bound has weights"),
        ({}, {"loss": "rescaled_kl", "offset_noise": 0.1}, "offset_noise=0.1 and loss='rescaled_kl'"),
        ({}, {"weighting": "edm", "weighting_gamma": 2.0}, "the weighting 'edm' takes sigma_data"),
        ({}, {"self_conditioning": 0.5}, "self_conditioning=0.5 and a model without self_condition"),
    ],
)
def test_what_does_not_go_together(process, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(process=tiny_process(**process), **config)


@pytest.mark.parametrize(
    ("variance", "config", "message"),
    [
        ("fixed_small", {"loss": "kl"}, "loss='kl' and prediction='eps': the bound is infinite where ᾱ is 0"),
        ("learned", {}, "loss='rescaled_mse' and prediction='eps'"),
        ("fixed_small", {"self_conditioning": 0.5}, "there is no x0 to be had from it where ᾱ is 0"),
        ("fixed_small", {"weighting": "edm"}, "'edm' of the prediction 'eps' is infinite at t = 99"),
    ],
)
def test_what_does_not_go_with_a_terminal_snr_of_zero(variance, config, message):
    betas = zero_terminal_snr(linear_betas(100))
    with pytest.raises(ValueError, match=message):
        tiny_loss(GaussianProcess(betas, "eps", variance), **config)
    tiny_loss(GaussianProcess(betas, "v", variance), **config)


@pytest.mark.parametrize(
    "field",
    [
        {"loss": "l1"},
        {"levels": 1},
        {"weighting": "min-snr"},
        {"weighting_gamma": 5.0},
        {"offset_noise": -0.1},
        {"offset_noise": math.inf},
        {"self_conditioning": 1.5},
    ],
)
def test_config_names_the_field(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))}="):
        TrainConfig(**field)
