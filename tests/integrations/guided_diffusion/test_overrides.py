"""Subclasses and users who put their own methods in place of the library's get what they say."""

import pytest
import torch

from diffkern.integrations.guided_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType, SpacedDiffusion
from tests.integrations.guided_diffusion.small import STEPS, diffusion, inputs, mean_model, model, seeded

STEP_CALLS = [("p_sample", {}), ("ddim_sample", {}), ("ddim_sample", {"eta": 0.5}), ("ddim_reverse_sample", {})]
ALWAYS = ("p_mean_variance", "q_posterior_mean_variance")


def gradient(x, t):
    return torch.cos(x)


def recording(method, calls):
    def own(self, *args, **kwargs):
        calls.append(method)
        return getattr(super(type(self), self), method)(*args, **kwargs)

    return type("Own", (SpacedDiffusion,), {method: own})


@pytest.mark.parametrize(
    ("method", "mean", "step", "options"),
    [
        *((method, ModelMeanType.EPSILON, *call) for method in ALWAYS for call in STEP_CALLS),
        *(("_predict_xstart_from_eps", ModelMeanType.EPSILON, *call) for call in STEP_CALLS),
        *(("_predict_xstart_from_xprev", ModelMeanType.PREVIOUS_X, *call) for call in STEP_CALLS),
        *(("_predict_eps_from_xstart", ModelMeanType.START_X, *call) for call in STEP_CALLS[1:]),
        *(("_scale_timesteps", ModelMeanType.START_X, *call) for call in STEP_CALLS),
        *(("_wrap_model", ModelMeanType.START_X, *call) for call in STEP_CALLS),
        ("condition_mean", ModelMeanType.EPSILON, "p_sample", {"cond_fn": gradient}),
        ("condition_score", ModelMeanType.EPSILON, "ddim_sample", {"cond_fn": gradient}),
    ],
)
def test_a_step_asks_the_overriding_method(method, mean, step, options):
    x, t = inputs()
    calls = []
    own = diffusion(recording(method, calls), range(STEPS), mean=mean)
    expected, _ = seeded(getattr(diffusion(mean=mean), step), model, x, t, **options)
    out, _ = seeded(getattr(own, step), model, x, t, **options)
    assert method in calls
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_a_method_set_on_the_object_counts(step, options, noise):
    """And adds what it adds: here 1 to the mean, or to x0."""
    x, t = inputs()
    d = diffusion(noise=noise)
    expected, _ = seeded(getattr(d, step), model, x, t, **options)
    inherited = d.p_mean_variance

    def shifted(*args, **kwargs):
        out = inherited(*args, **kwargs)
        return {**out, "mean": out["mean"] + 1, "pred_xstart": out["pred_xstart"] + 1}

    d.p_mean_variance = shifted
    out, _ = seeded(getattr(d, step), model, x, t, **options)
    torch.testing.assert_close(out["pred_xstart"], expected["pred_xstart"] + 1)
    if step == "p_sample":
        torch.testing.assert_close(out["sample"], expected["sample"] + 1, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.allclose(out["sample"], expected["sample"], atol=1e-3)


def test_a_method_put_into_the_class_counts(monkeypatch):
    x, t = inputs()
    inherited = GaussianDiffusion._predict_xstart_from_eps
    monkeypatch.setattr(GaussianDiffusion, "_predict_xstart_from_eps", lambda *args: 0 * inherited(*args))
    assert not diffusion().p_sample(model, x, t)["pred_xstart"].any()


def test_the_denoised_fn_comes_before_clipping_in_every_step():
    x, t = inputs()
    for step, options in STEP_CALLS:
        expected, _ = seeded(getattr(diffusion(), step), model, x, t, **options)
        out, _ = seeded(getattr(diffusion(), step), model, x, t, denoised_fn=lambda x0: x0, **options)
        torch.testing.assert_close(out["sample"], expected["sample"], rtol=1e-5, atol=1e-5)
        out = getattr(diffusion(), step)(model, x, t, denoised_fn=lambda x0: torch.full_like(x0, 7.0), **options)
        assert (out["pred_xstart"] == 1).all()


class Wrapped:
    def __init__(self, model, timesteps):
        self.model, self.timesteps = model, timesteps

    def __call__(self, x, ts, **kwargs):
        return self.model(x, torch.tensor(self.timesteps)[ts], **kwargs)


class ForkOfRespacing(GaussianDiffusion):
    """A codebase's own respacing, of which only the base class was replaced."""

    def __init__(self, timesteps, **kwargs):
        self.timesteps = sorted(timesteps)
        abar = GaussianDiffusion(**kwargs).alphas_cumprod[self.timesteps]
        kwargs["betas"] = [1 - b / a for a, b in zip([1.0, *abar[:-1]], abar, strict=True)]
        super().__init__(**kwargs)

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self.wrapped(model), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self.wrapped(cond_fn), *args, **kwargs)

    def wrapped(self, model):
        return model if isinstance(model, Wrapped) else Wrapped(model, self.timesteps)


def test_a_forks_own_respacing_gives_the_same():
    x, t = inputs(t=(0, 1, 2, 3))
    kept = {2, 5, 11, 19}
    ours, _ = seeded(diffusion(SpacedDiffusion, kept).p_sample, model, x, t, cond_fn=gradient)
    forks, _ = seeded(diffusion(ForkOfRespacing, kept).p_sample, model, x, t, cond_fn=gradient)
    for name, value in ours.items():
        torch.testing.assert_close(forks[name], value, rtol=1e-5, atol=1e-5)


def test_a_model_is_wrapped_once_and_a_classifier_too():
    seen = []
    d = diffusion(SpacedDiffusion, {2, 5, 11, 19}, rescale_timesteps=True, variance=ModelVarType.FIXED_SMALL)
    x, t = inputs(t=(0, 1, 2, 3))
    wrapped = d._wrap_model(lambda x, t: (seen.append(t), mean_model(x, t))[1])
    assert d._wrap_model(wrapped) is wrapped
    d.p_sample(wrapped, x, t, cond_fn=lambda x, t: (seen.append(t), gradient(x, t))[1])
    for given in seen:
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, torch.tensor([2.0, 5.0, 11.0, 19.0]) * 1000 / STEPS)
    assert len(seen) == 2
