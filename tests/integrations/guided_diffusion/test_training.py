"""Losses and the bound: what they draw, in which dtype and layout, and what is refused."""

import numpy as np
import pytest
import torch

from diffkern.integrations.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from tests.integrations.guided_diffusion.exact_losses import Exact
from tests.integrations.guided_diffusion.small import (
    SHAPE,
    STEPS,
    by_methods,
    diffusion,
    gradient_of,
    images,
    mean_model,
    model,
    network_for,
    seeded,
)


@pytest.mark.parametrize("loss", list(LossType))
def test_one_draw_for_the_losses_before_the_network_is_asked(loss):
    x0, t = images()

    def drawing(x, t):
        return model(x, t) + 0.1 * torch.rand(1)

    d = diffusion(loss=loss)
    terms, state = seeded(d.training_losses, drawing, x0, t)
    torch.manual_seed(11)
    noise = torch.randn_like(x0)
    expected = d.training_losses(drawing, x0, t, noise=noise)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in terms.items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("road", [lambda d: d, by_methods])
def test_one_draw_for_each_t_of_the_bound_the_largest_first(road):
    x0, _ = images()
    seen = []

    def network(x, t):
        seen.append((x, t.tolist()))
        return model(x, t) + 0.1 * torch.rand(1)

    d = road(diffusion())
    found, state = seeded(d.calc_bpd_loop, network, x0)
    assert [t for _, t in seen] == [[i] * 4 for i in reversed(range(STEPS))]
    torch.manual_seed(11)
    for (x_t, t), vb in zip(seen, found["vb"].T, strict=True):
        noise, t = torch.randn_like(x0), torch.tensor(t)
        torch.testing.assert_close(x_t, d.q_sample(x0, t, noise))
        output = model(x_t, t) + 0.1 * torch.rand(1)
        torch.testing.assert_close(vb.double(), Exact(d, output, x0, x_t, t, True).vb(), rtol=1e-4, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found["total_bpd"], found["vb"].sum(1) + found["prior_bpd"])


def test_the_bound_takes_no_gradient():
    network = torch.nn.Conv2d(3, 6, 1)
    for value in diffusion().calc_bpd_loop(lambda x, t: network(x), images()[0].requires_grad_()).values():
        assert not value.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("variance", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE])
@pytest.mark.parametrize("loss", [LossType.MSE, LossType.KL])
def test_philox_noise_is_the_same_on_both_roads_and_one_number_is_drawn(loss, variance):
    x0, t = images()
    d = diffusion(noise="philox", loss=loss, variance=variance)
    terms, state = seeded(d.training_losses, network_for(d), x0, t)
    assert torch.equal(seeded(torch.randint, 2**63 - 1, ())[1], state)
    expected, _ = seeded(by_methods(d).training_losses, network_for(d), x0, t)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    torch.manual_seed(12)
    assert not torch.equal(d.training_losses(network_for(d), x0, t)["loss"], terms["loss"])
    found, _ = seeded(d.calc_bpd_loop, network_for(d), x0)
    again, _ = seeded(by_methods(d).calc_bpd_loop, network_for(d), x0)
    for name, value in found.items():
        torch.testing.assert_close(value, again[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", list(LossType))
def test_16_bit_images_and_outputs_give_float32_losses(loss, dtype):
    """As the same values in float32 do; noise is drawn in the images' dtype, and the gradient is rounded once."""
    x0, t = images()
    x0, noise = x0.to(dtype), torch.randn(SHAPE).to(dtype)
    output = model(x0.float(), t).to(dtype)
    d = diffusion(loss=loss)
    _, state = seeded(d.training_losses, lambda x, t: output, x0, t)
    assert torch.equal(state, seeded(torch.randn_like, x0)[1])
    for road in (d, by_methods(d)):
        leaf, wide = output.clone().requires_grad_(), output.float().requires_grad_()
        terms = road.training_losses(lambda x, t, leaf=leaf: leaf, x0, t, noise=noise)
        expected = road.training_losses(lambda x, t, wide=wide: wide, x0.float(), t, noise=noise.float())
        for name, value in terms.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=0)
        (1000 * terms["loss"]).sum().backward()
        (1000 * expected["loss"]).sum().backward()
        torch.testing.assert_close(leaf.grad, wide.grad.to(dtype), rtol=1e-2, atol=1e-3)


def test_float64_images_make_float64_losses():
    x0, t = images()
    noise = torch.randn(SHAPE)
    for loss in LossType:
        d = diffusion(loss=loss)
        for road in (d, by_methods(d)):
            terms = road.training_losses(lambda x, t: model(x, t).float(), x0.double(), t, noise=noise.double())
            assert all(value.dtype == torch.float64 for value in terms.values())
    found = d.calc_bpd_loop(lambda x, t: model(x, t).float(), x0.double())
    assert all(value.dtype == torch.float64 for value in found.values())


@pytest.mark.parametrize("loss", list(LossType))
def test_layouts_ranks_and_inputs(loss):
    d = diffusion(loss=loss)
    for shape in (SHAPE, (4, 3), (4, 2, 7), (4, 2, 3, 4, 5)):
        x0, t = images(shape=shape)
        noise = torch.randn(shape)
        terms, gradient = gradient_of(d, x0, t, noise)
        expected, wanted = gradient_of(by_methods(d), x0, t, noise)
        for name, value in terms.items():
            assert value.shape == (4,)
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=2e-4 * wanted.abs().max().item())
    x0, t = images()
    noise = torch.randn(SHAPE)
    kept = [value.clone() for value in (x0, t, noise)]
    _, contiguous = gradient_of(d, x0, t, noise)
    last = [value.to(memory_format=torch.channels_last) for value in (x0, noise)]
    _, gradient = gradient_of(d, last[0], t, last[1])
    torch.testing.assert_close(gradient, contiguous, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before) for value, before in zip((x0, t, noise), kept, strict=True))


@pytest.mark.parametrize("loss", list(LossType))
def test_a_nan_stays_in_its_sample(loss):
    x0, t = images()
    x0[1, 0, 0, 0] = torch.nan
    terms, gradient = gradient_of(diffusion(loss=loss), x0, t, torch.randn(SHAPE))
    for value in (*terms.values(), gradient):
        assert not value[[0, 2, 3]].isnan().any()
    assert terms["loss"][1].isnan()


def test_zero_terminal_snr():
    x0, t = images()
    betas = [*diffusion().betas[:-1], 1.0]
    d = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.KL,
    )
    assert d.training_losses(mean_model, x0, t)["loss"].isfinite().all()


def test_errors():
    x0, t = images()
    d = diffusion()
    with pytest.raises(ValueError, match=r"noise .*\(4, 3, 8, 8\)"):
        d.training_losses(model, x0, t, noise=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 20\), got 20 at position 3"):
        d.training_losses(model, x0, torch.tensor([0, 1, 2, STEPS]))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 20\)"):
        d._vb_terms_bpd(model, x0, x0, torch.tensor([0, 1, 2, STEPS]))
    with pytest.raises(ValueError, match=r"for 2C set a learned model_var_type"):
        diffusion(variance=ModelVarType.FIXED_SMALL).training_losses(model, x0, t)
    with pytest.raises(ValueError, match=r"loss_type is 'MSE'; it may be one of LossType\.MSE"):
        diffusion(loss="MSE").training_losses(model, x0, t)
    for shape in ((4, 3, 8, 7), (4, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"x_start|x0"):
            d._vb_terms_bpd(model, torch.zeros(shape), x0, t)


def test_the_bound_is_the_entropy_of_data_whose_reverse_process_the_network_knows():
    """Gaussian data: then p(x_{t−1} | x_t) is Gaussian, and with its mean and variance nothing is lost at any step."""
    std = 0.25
    d = diffusion(mean=ModelMeanType.PREVIOUS_X, variance=ModelVarType.LEARNED)

    def exact(x, t):
        s2, coef1, coef2, added = (
            torch.tensor(table)[t].reshape(-1, 1)
            for table in (d.alphas_cumprod, d.posterior_mean_coef1, d.posterior_mean_coef2, d.posterior_variance)
        )
        x0 = s2.sqrt() * std**2 / (s2 * std**2 + 1 - s2) * x
        variance = added + coef1**2 * std**2 * (1 - s2) / (s2 * std**2 + 1 - s2)
        return torch.cat([coef1 * x0 + coef2 * x, variance.log().expand_as(x)], dim=1).float()

    generator = torch.Generator().manual_seed(0)
    x0 = ((std * torch.randn(64, 4096, generator=generator)) * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1
    found, _ = seeded(d.calc_bpd_loop, exact, x0, clip_denoised=False)
    entropy = np.log2(std * np.sqrt(2 * np.pi * np.e) * 255 / 2)
    assert abs(found["total_bpd"].mean() - entropy) < 0.01


def test_a_first_call_in_inference_mode_leaves_nothing_that_autograd_cannot_save():
    x0, t = images()
    d = diffusion()
    with torch.inference_mode():
        d.training_losses(model, x0, t)
        d.calc_bpd_loop(model, x0)
    x0.requires_grad_()
    d.training_losses(model, x0, t)["loss"].sum().backward()
    assert x0.grad.isfinite().all()


@pytest.mark.parametrize("loss", list(LossType))
def test_terms_may_be_written_into(loss):
    """As those of the replaced code: no term is a view of another's memory."""
    x0, t = images()
    d = diffusion(loss=loss)
    network = torch.nn.Conv2d(3, 6, 1)
    gradients = []
    for factor in (1, 2):
        network.zero_grad()
        terms = d.training_losses(lambda x, t: network(x), x0, t, noise=torch.ones_like(x0))
        for value in terms.values():
            value.mul_(factor)
        terms["loss"].sum().backward()
        gradients.append(network.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
