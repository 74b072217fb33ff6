"""The bound against problems whose likelihood is known, and what must not change it."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from diffkern.evaluation import estimate_eps_mean_square, evaluate_nll, plot_terms
from diffkern.process import FlowProcess, GaussianProcess, linear_betas
from diffkern.process.likelihood import prior_bits_per_dim
from tests.evaluation.problems import (
    GRID,
    GaussianDenoiser,
    GridDenoiser,
    gaussian_bits,
    gaussian_images,
    gaussian_mean_squares,
    grid_bits,
    grid_bound,
    grid_entropy,
    grid_images,
)

LEVELS = 4001  # bins of a 400th of the Gaussian's deviation


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def process_of(steps, variance="fixed_small", prediction="x0"):
    return GaussianProcess(linear_betas(1000), prediction, variance).respace(steps)


def best_process(steps, prediction="x0"):
    process = process_of(steps, prediction=prediction)
    return GaussianProcess(process.betas, prediction, "analytic", process.timestep_map, gaussian_mean_squares(process))


def gaussian_model(process):
    """It is given the original process's timesteps, and looks them up there."""
    return GaussianDenoiser(GaussianProcess(linear_betas(1000), process.prediction))


@pytest.mark.parametrize(("steps", "scale"), [(25, 1.0), (25, 0.97), (200, 1.0)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_each_term_is_the_integral_within_the_error_bars(steps, scale, variance):
    """Pixels on a grid: every term of data and noise as an integral in float64, and the bound above −log2 p."""
    process = process_of(steps, variance)
    images = grid_images(200)
    result = evaluate_nll(GridDenoiser(process, scale), process, images, levels=17, clip=None, seed=steps)
    expected = grid_bound(process, scale)
    mean, error = result.curve
    # Rare mistakes of an almost certain denoiser make rare large terms, which few images need not show: absolute 1e-4.
    assert (np.abs(mean - expected) < 5 * error + 1e-4).all()
    exact = prior_bits_per_dim((images.double() ** 2).mean(dim=(1, 2, 3)).numpy(), process.alphas_cumprod[-1])
    np.testing.assert_allclose(result.prior, exact, rtol=1e-12)
    assert abs(result.bits_per_dim - (expected.sum() + exact.mean())) < 4 * result.standard_error
    assert expected.sum() + exact.mean() > grid_entropy()
    assert result.bits_per_dim > grid_bits(images).mean()


def test_the_bound_closes_with_more_steps():
    """On a grid the reverse steps are no Gaussians: the gap is the integral's, and falls as steps become small."""
    gaps = []
    for steps in (25, 100, 400, 1000):
        process = process_of(steps)
        prior = prior_bits_per_dim([0.5], process.alphas_cumprod[-1])[0]
        gaps.append(grid_bound(process, points=201).sum() + prior - grid_entropy())
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 0.16
    images = grid_images(30, seed=1)
    result = evaluate_nll(GridDenoiser(process), process, images, levels=17, seed=2)
    gap = result.total - grid_bits(images)
    assert abs(gap.mean() - gaps[-1]) < 4 * gap.std() / np.sqrt(30)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "x_prev", "flow"])
def test_a_gaussian_with_its_own_variance_has_no_gap_but_the_prior(prediction):
    """The bound of the best network with the analytic variance in closed form, for 5 steps as for 100."""
    for steps in (5, 100):
        process = best_process(steps, prediction)
        images = gaussian_images(300, LEVELS)
        model = gaussian_model(process)
        if prediction == "x_prev":  # depends on how far back the step goes: the shorter process's own
            model = GaussianDenoiser(process)
            process = GaussianProcess(process.betas, prediction, "analytic", None, process.eps_mean_square)
        result = evaluate_nll(model, process, images, levels=LEVELS, seed=1, clip=None)
        expected = gaussian_bits(process, LEVELS)
        assert abs(result.bits_per_dim - expected) < 4 * result.standard_error
        # A tighter check: the spread of −log2 p over the images is known and taken off.
        surplus = result.total - 0.5 * ((images.double() / 0.2) ** 2 - 1).mean(dim=(1, 2, 3)).numpy() / np.log(2)
        assert abs(surplus.mean() - expected) < 4 * surplus.std() / np.sqrt(300)
        other = process_of(steps, "fixed_large", prediction)
        if prediction != "x_prev" and steps == 5:
            assert evaluate_nll(model, other, images, levels=LEVELS, seed=1).bits_per_dim > result.bits_per_dim + 0.1


def test_the_interval_covers_the_truth():
    """In 100 evaluations of 30 images each: 95 are expected, 4 standard deviations of that fewer are allowed."""
    process = best_process(4)
    truth, inside = gaussian_bits(process, LEVELS), 0
    for seed in range(100):
        images = gaussian_images(30, LEVELS, seed, shape=(1, 2, 2))
        low, high = evaluate_nll(gaussian_model(process), process, images, levels=LEVELS, seed=seed).confidence
        inside += low < truth < high
    assert 86 <= inside <= 99


def test_clipping_lowers_the_terms_of_a_network_that_overshoots():
    process = process_of(20, "fixed_large")
    images = grid_images(20)
    model = GridDenoiser(process, scale=1.3)
    clipped, plain = (evaluate_nll(model, process, images, levels=17, clip=clip) for clip in [(-1, 1), None])
    assert (clipped.vb[:, 1:] <= plain.vb[:, 1:] + 1e-6).all()
    assert (clipped.x0_mse < plain.x0_mse).any()
    np.testing.assert_array_equal(clipped.mse, plain.mse)


def test_neither_batches_nor_other_images_change_a_term():
    process = process_of(13)
    images, model = grid_images(9), GridDenoiser(process)
    whole = evaluate_nll(model, process, images, levels=17, seed=7)
    for batch_size in (1, 10, 13, 64):
        part = evaluate_nll(model, process, images[:5], levels=17, seed=7, batch_size=batch_size)
        for name in ("vb", "mse", "x0_mse", "prior"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:5])
    assert (evaluate_nll(model, process, images, levels=17, seed=8).vb != whole.vb).any()
    assert whole.vb.shape == (9, 13)
    # Each image and each timestep has noise of its own.
    same = evaluate_nll(model, process, images[:1].repeat(3, 1, 1, 1), levels=17)
    noisy = same.mse[:, 1:]  # at t = 0 this network makes no mistake
    assert len(np.unique(noisy)) == noisy.size


def test_several_draws_are_averaged():
    process = process_of(10)
    images, model = grid_images(40), GridDenoiser(process)
    one, four = (evaluate_nll(model, process, images, levels=17, draws=draws) for draws in (1, 4))
    np.testing.assert_allclose(one.prior, four.prior)
    within = [(result.total - grid_bits(images)).std() for result in (one, four)]
    assert within[1] < 0.75 * within[0]


class Labelled(nn.Module):
    """Remembers what it was called with."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, t, y):
        assert not torch.is_grad_enabled()
        assert not self.dropout.training
        assert x.dtype == torch.float32
        self.seen += zip(t.tolist(), y.tolist(), strict=True)
        return self.weight * x


def test_labels_are_the_images_own_and_the_model_is_left_as_it_was():
    process = process_of(4)
    model = Labelled()
    data = TensorDataset(grid_images(5), torch.tensor([2, 0, 1, 1, 2]))
    evaluate_nll(model, process, data, levels=17, batch_size=3)
    assert model.seen == [(t, y) for y in (2, 0, 1, 1, 2) for t in process.timestep_map.tolist()]
    assert model.dropout.training
    with pytest.raises(ValueError, match="image 0 of the data has no label; the model takes 0 to 2"):
        evaluate_nll(model, process, grid_images(2), levels=17)
    with pytest.raises(ValueError, match="image 1 of the data has label 3"):
        evaluate_nll(model, process, TensorDataset(grid_images(2), torch.tensor([2, 3])), levels=17)


def test_fractional_times_reach_the_network_as_float32():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    times = [0.5, 7.25, 900.125]
    process = GaussianProcess([0.1, 0.2, 0.3], timestep_map=times)
    evaluate_nll(network, process, grid_images(1), levels=17)
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == times
    evaluate_nll(network, GaussianProcess([0.1, 0.2, 0.3], timestep_map=[1, 5, 9]), grid_images(1), levels=17)
    assert seen[1].dtype == torch.int64


def test_a_learned_variance():
    """Further channels that say log β̃ give the bound of fixed_small."""
    fixed, learned = process_of(20), process_of(20, "learned_range")
    images, mean = grid_images(6), GridDenoiser(fixed)

    def network(x, t):
        return torch.cat([mean(x, t), torch.full_like(x, -1.0)], dim=1)

    one, other = (evaluate_nll(m, p, images, levels=17) for m, p in [(mean, fixed), (network, learned)])
    np.testing.assert_allclose(one.vb, other.vb, rtol=1e-4, atol=1e-6)


def test_the_estimate_of_the_mean_squares():
    process = process_of(20, prediction="v")
    images, model = gaussian_images(100, LEVELS), gaussian_model(process_of(20, prediction="v"))
    found = estimate_eps_mean_square(model, process, images, draws=2)
    exact = gaussian_mean_squares(process)
    # ε̂² is exact·χ²: its relative deviation is √2 for one value, and there are 100·16 of each noise twice.
    assert (np.abs(found - exact) < 5 * exact * np.sqrt(2 / 1600)).all()
    assert found.dtype == np.float64
    # Images in [−1, 1] have a variance of at most 1, whatever the network says.
    least = 1 - process.alphas_cumprod / (1 - process.alphas_cumprod)
    nothing = estimate_eps_mean_square(lambda x, t: torch.zeros_like(x), process_of(20, prediction="eps"), images)
    np.testing.assert_array_equal(nothing, np.maximum(least, 0))
    with pytest.raises(ValueError, match="a learned variance is not estimated"):
        estimate_eps_mean_square(model, process_of(20, "learned"), images)
    with pytest.raises(ValueError, match="eps cannot be had"):
        estimate_eps_mean_square(model, GaussianProcess(np.full(1000, 0.9), "x_prev"), images)


def test_the_result_as_json_and_as_a_picture(tmp_path):
    process = process_of(6)
    result = evaluate_nll(GridDenoiser(process), process, grid_images(4), levels=17, output=tmp_path / "deep" / "run")
    stored = json.loads((tmp_path / "deep" / "run" / "nll.json").read_text())
    assert stored["bits_per_dim"] == result.bits_per_dim == pytest.approx(result.total.mean())
    assert stored["bits_per_dim"] == pytest.approx(stored["decoder"] + stored["kl"] + stored["prior"])
    assert stored["confidence_95"][0] == pytest.approx(result.bits_per_dim - 1.95996 * result.standard_error)
    assert (stored["images"], stored["settings"]["levels"]) == (4, 17)
    assert stored["timesteps"] == process.timestep_map.tolist()
    assert result.standard_error == pytest.approx(np.std(result.total, ddof=1) / 2)
    with np.load(tmp_path / "deep" / "run" / "nll.npz") as arrays:
        np.testing.assert_array_equal(arrays["vb"], result.vb)
    single = evaluate_nll(GridDenoiser(process), process, grid_images(1), levels=17)
    assert single.to_json()["confidence_95"] == [None, None]
    for count, shown in enumerate((result, single)):
        plot_terms(shown, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"levels": 1}, "levels is 1"),
        ({"draws": 0}, "draws is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"clip": (1, -1)}, "clip is "),
        ({"data": torch.zeros(0, 1, 2, 2)}, "there are no images"),
        ({"data": torch.full((2, 1, 2, 2), 1.5)}, r"image 0 of the data holds NaN or values outside \[-1, 1\]"),
        ({"data": torch.full((2, 1, 2, 2), torch.nan)}, "image 0 of the data holds NaN"),
        ({"data": torch.zeros(2, 2, 2)}, r"image 0 of the data is torch.float32 \(2, 2\)"),
        ({"data": [torch.zeros(1, 2, 2), torch.zeros(1, 3, 2)]}, r"image 1 of the data is \(1, 3, 2\)"),
        ({"data": torch.zeros(2, 1, 2, 2, dtype=torch.uint8)}, "torch.uint8"),
    ],
)
def test_errors(kwargs, message):
    process = process_of(3)
    arguments = {"data": grid_images(2), "levels": 17, **kwargs}
    with pytest.raises(ValueError, match=message):
        evaluate_nll(GridDenoiser(process), process, **arguments)


@pytest.mark.filterwarnings("ignore:.*grey levels")
def test_a_flow_has_no_bound():
    for evaluate in (evaluate_nll, estimate_eps_mean_square):
        with pytest.raises(TypeError, match="process is a FlowProcess; it must be a GaussianProcess"):
            evaluate(lambda x, t: x, FlowProcess(10), grid_images(2))


def test_a_network_that_gives_nan_is_named_by_image_and_timestep():
    process = GaussianProcess(linear_betas(100)).keep(range(10))

    def broken(x, t):
        return torch.where((t == 4).view(-1, 1, 1, 1), torch.nan, x)

    with pytest.raises(FloatingPointError, match="image 0 at timestep 4"):
        evaluate_nll(broken, process, grid_images(3), levels=17)
    with pytest.raises(TypeError, match="model must return a tensor"):
        evaluate_nll(lambda x, t: None, process, grid_images(3), levels=17)


def test_a_wrong_number_of_levels_is_warned_of():
    process = process_of(3)
    with pytest.warns(UserWarning, match="6 of 6 images have pixels that are none of 16 grey levels"):
        evaluate_nll(GridDenoiser(process), process, grid_images(6), levels=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_nll(GridDenoiser(process), process, torch.tensor(GRID).float().view(1, 1, 1, 17), levels=17)
