"""Subclasses and users with methods, tables and networks of their own get the losses that these make."""

import numpy as np
import pytest
import torch

from diffkern.integrations.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
)
from tests.integrations.guided_diffusion.small import (
    SHAPE,
    STEPS,
    by_methods,
    diffusion,
    gradient_of,
    images,
    mean_model,
    model,
    seeded,
)

METHODS = (
    "q_sample",
    "p_mean_variance",
    "q_posterior_mean_variance",
    "_vb_terms_bpd",
    "_predict_xstart_from_eps",
    "_scale_timesteps",
    "_wrap_model",
)


def own(method, calls):
    def recorded(self, *args, **kwargs):
        calls.append(method)
        return getattr(super(type(self), self), method)(*args, **kwargs)

    return type("Own", (SpacedDiffusion,), {method: recorded})


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("method", METHODS)
def test_losses_ask_the_overriding_method(method, loss):
    x0, t = images()
    noise, calls = torch.randn(SHAPE), []
    d = diffusion(own(method, calls), range(STEPS), loss=loss)
    terms = d.training_losses(model, x0, t, noise=noise)
    assert method in calls
    for name, value in diffusion(loss=loss).training_losses(model, x0, t, noise=noise).items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS, "_predict_eps_from_xstart", "_prior_bpd", "q_mean_variance"])
def test_the_bound_asks_the_overriding_method(method):
    x0, _ = images()
    calls = []
    expected, _ = seeded(diffusion().calc_bpd_loop, model, x0)
    found, _ = seeded(diffusion(own(method, calls), range(STEPS)).calc_bpd_loop, model, x0)
    assert method in calls
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)


def test_the_target_of_previous_x_is_the_overridden_posteriors_mean():
    x0, t = images()
    d = diffusion(mean=ModelMeanType.PREVIOUS_X, variance=ModelVarType.FIXED_SMALL)
    inherited = d.q_posterior_mean_variance
    d.q_posterior_mean_variance = lambda **kwargs: (torch.full(SHAPE, 2.0), *inherited(**kwargs)[1:])
    assert d.training_losses(lambda x, t: torch.zeros(SHAPE), x0, t)["mse"].tolist() == [4.0] * 4


class ForkOfTheHybrid(GaussianDiffusion):
    """A codebase's own training_losses, which asks for a term of the bound with a network that repeats itself."""

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        mean, variance = torch.split(output, x_start.shape[1], dim=1)
        frozen = torch.cat([mean.detach(), variance], dim=1)
        vb = self._vb_terms_bpd(model=lambda *args, r=frozen: r, x_start=x_start, x_t=x_t, t=t, clip_denoised=False)[
            "output"
        ]
        mse = (noise - mean).square().mean((1, 2, 3))
        return {"vb": vb, "mse": mse, "loss": mse + vb}


def test_a_forks_own_losses():
    x0, t = images()
    noise = torch.randn(SHAPE)
    terms, gradient = gradient_of(diffusion(ForkOfTheHybrid), x0, t, noise)
    expected, expected_gradient = gradient_of(diffusion(), x0, t, noise)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_the_network_is_given_the_original_timesteps_and_its_arguments():
    x0, t = images()[0], torch.tensor([0, 1, 2, 3])
    for loss in LossType:
        seen = []

        def network(x, t, *, y, seen=seen):
            seen.append((t, y))
            return model(x, t)

        d = diffusion(SpacedDiffusion, {2, 5, 11, 19}, rescale_timesteps=True, loss=loss)
        d.training_losses(network, x0, t, model_kwargs={"y": 7})
        ((given, y),) = seen
        assert y == 7
        torch.testing.assert_close(given, torch.tensor([2.0, 5.0, 11.0, 19.0]) * 1000 / STEPS)
        wrapped = d._wrap_model(lambda x, t, seen=seen: (seen.append((t, None)), model(x, t))[1])
        d.training_losses(wrapped, x0, t)
        assert torch.equal(seen[-1][0], given)
    d.calc_bpd_loop(network, x0, model_kwargs={"y": 7})
    assert [t[0].item() * STEPS / 1000 for t, _ in seen[-4:]] == [19, 11, 5, 2]


def test_replaced_tables_take_effect_and_may_contradict_each_other():
    x0, t = images()
    noise = torch.randn(SHAPE)
    d = diffusion(variance=ModelVarType.FIXED_SMALL, loss=LossType.KL)
    before = d.training_losses(mean_model, x0, t, noise=noise)["loss"]
    d.posterior_log_variance_clipped = d.posterior_log_variance_clipped + np.log(4.0)
    wider = d.training_losses(mean_model, x0, t, noise=noise)["loss"]
    torch.testing.assert_close(wider, by_methods(d).training_losses(mean_model, x0, t, noise=noise)["loss"])
    assert not torch.allclose(wider, before)
    d.sqrt_recip_alphas_cumprod = 1.5 * d.sqrt_recip_alphas_cumprod
    contradicting = d.training_losses(mean_model, x0, t, noise=noise)["loss"]
    torch.testing.assert_close(contradicting, by_methods(d).training_losses(mean_model, x0, t, noise=noise)["loss"])
    assert not torch.allclose(wider, contradicting)
