"""Steps and loops: what they draw, in which dtype and layout, and that nothing of one sample reaches another."""

import copy
import pickle

import pytest
import torch

from diffkern.integrations.guided_diffusion import ModelMeanType, ModelVarType, SpacedDiffusion, steps
from tests.integrations.guided_diffusion.small import SHAPE, STEPS, diffusion, inputs, mean_model, model, seeded

LOOPS = {
    "p_sample_loop": {},
    "ddim_sample_loop": {},
    "ddim_sample_loop eta=0.7": {"eta": 0.7},
}
STEP_CALLS = [("p_sample", {}), ("ddim_sample", {}), ("ddim_sample", {"eta": 0.5}), ("ddim_reverse_sample", {})]


def named(d, loop):
    return getattr(d, loop.split()[0])


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 5, 7), (1, 1, 3)])
@pytest.mark.parametrize("loop", LOOPS)
def test_draws_are_the_peers_in_its_order(loop, shape):
    """x_T, then one randn_like a step, also where it adds nothing: later draws would differ otherwise."""
    (_, state) = seeded(named(diffusion(), loop), model, shape, **LOOPS[loop])
    _, expected = seeded(lambda: [torch.randn(*shape) for _ in range(STEPS + 1)])
    assert torch.equal(state, expected)


@pytest.mark.parametrize("loop", LOOPS)
def test_given_noise_takes_the_place_of_the_first_draw(loop):
    x_T, _ = inputs()
    before = x_T.clone()
    sample, state = seeded(named(diffusion(), loop), model, SHAPE, noise=x_T, **LOOPS[loop])
    _, expected = seeded(lambda: [torch.randn(SHAPE) for _ in range(STEPS)])
    assert torch.equal(state, expected)
    assert torch.equal(x_T, before)
    assert not torch.equal(sample, before)


def test_the_noise_of_a_step_is_drawn_after_the_model_and_before_the_classifier():
    x, t = inputs()

    def drawing_model(x, t):
        return model(x, t) + 0.1 * torch.rand(1)

    def drawing_gradient(x, t):
        return torch.rand_like(x)

    out, state = seeded(diffusion().p_sample, drawing_model, x, t, cond_fn=drawing_gradient)
    torch.manual_seed(11)
    said = model(x, t) + 0.1 * torch.rand(1)
    noise = torch.randn_like(x)
    gradient = torch.rand_like(x)
    assert torch.equal(state, torch.get_rng_state())
    d = diffusion()
    known = d.p_mean_variance(lambda x, t: said, x, t)
    expected = (
        known["mean"] + known["variance"] * gradient + (t > 0).reshape(-1, 1, 1, 1) * known["variance"].sqrt() * noise
    )
    torch.testing.assert_close(out["sample"], expected)


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_return_the_last_of_their_steps(loop):
    d = diffusion()
    sample, _ = seeded(named(d, loop), model, SHAPE, **LOOPS[loop])
    progressive = getattr(d, loop.split()[0] + "_progressive")
    outs, _ = seeded(lambda: list(progressive(model, list(SHAPE), **LOOPS[loop])))
    assert len(outs) == STEPS
    assert all(set(out) == {"sample", "pred_xstart"} for out in outs)
    assert torch.equal(outs[-1]["sample"], sample)
    # Nothing noisy is left: the last step returns x0 itself.
    torch.testing.assert_close(sample, outs[-1]["pred_xstart"], atol=0.02, rtol=0)


def test_progress_changes_nothing(capsys):
    sample, _ = seeded(diffusion().p_sample_loop, model, SHAPE)
    shown, _ = seeded(diffusion().p_sample_loop, model, SHAPE, progress=True)
    assert torch.equal(sample, shown)
    assert "20/20" in capsys.readouterr().err


def test_loops_take_no_gradient_and_leave_grad_mode_alone():
    network = torch.nn.Conv2d(3, 6, 1)
    for out in diffusion().p_sample_loop_progressive(lambda x, t: network(x), SHAPE):
        assert not out["sample"].requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_mixed_timesteps_are_each_samples_own(step, options, monkeypatch):
    x, t = inputs()
    noise = torch.randn(SHAPE)
    d = diffusion()
    monkeypatch.setattr(steps, "noise_source", lambda kind, like: {"noise": noise})
    together = getattr(d, step)(model, x, t, **options)
    for i in range(len(t)):
        monkeypatch.setattr(steps, "noise_source", lambda kind, like, i=i: {"noise": noise[i : i + 1]})
        alone = getattr(d, step)(model, x[i : i + 1], t[i : i + 1], **options)
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][i])


@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_layout_and_inputs_are_kept(step, options, monkeypatch):
    x, t = inputs()
    noise = torch.randn(SHAPE)
    monkeypatch.setattr(steps, "noise_source", lambda kind, like: {"noise": noise})
    d = diffusion()
    expected = getattr(d, step)(model, x, t, **options)
    last = x.to(memory_format=torch.channels_last)
    before, timesteps = last.clone(), t.clone()
    out = getattr(d, step)(model, last, t, **options)
    for name, value in out.items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(value, expected[name])
    assert torch.equal(last, before)
    assert torch.equal(t, timesteps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_dtypes(step, options, dtype):
    """16-bit images come out as float32, having been drawn noise of their own dtype, as the peer does."""
    x, t = inputs()
    x, wider = x.to(dtype), x.to(dtype).to(torch.promote_types(dtype, torch.float32))

    def said(x, t):
        return model(wider, t).to(dtype)

    d = diffusion()
    out, state = seeded(getattr(d, step), said, x, t, **options)
    if step != "ddim_reverse_sample":
        _, drawn = seeded(torch.randn_like, x)
        assert torch.equal(state, drawn)
    d.p_mean_variance = d.p_mean_variance  # the road of the methods
    expected, _ = seeded(getattr(d, step), said, x, t, **options)
    for name, value in out.items():
        assert value.dtype == wider.dtype
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
    if dtype != torch.float64:
        assert d.q_sample(x, t).dtype == torch.float32
        assert d.q_mean_variance(x, t)[0].dtype == torch.float32


@pytest.mark.parametrize("mean", list(ModelMeanType))
@pytest.mark.parametrize("denoised_fn", [None, torch.clone])
def test_float64_images_come_out_as_float64_whatever_the_network_returns(mean, denoised_fn):
    x, t = inputs()
    out = diffusion(mean=mean).p_sample(lambda x, t: model(x, t).float(), x.double(), t, denoised_fn=denoised_fn)
    assert out["sample"].dtype == out["pred_xstart"].dtype == torch.float64


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample"])
def test_a_cond_fn_that_returns_nothing_is_refused(step):
    with pytest.raises(TypeError, match="cond_fn must return a tensor, got NoneType"):
        getattr(diffusion(), step)(model, *inputs(), cond_fn=lambda x, t: None)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 2, 3, 4, 5)])
@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_any_rank(step, options, shape):
    x, t = inputs(shape=shape)
    d = diffusion()
    out, _ = seeded(getattr(d, step), model, x, t, **options)
    d.p_mean_variance = d.p_mean_variance
    expected, _ = seeded(getattr(d, step), model, x, t, **options)
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


def test_a_nan_stays_in_its_sample():
    x, t = inputs()
    x[1, 0, 0, 0] = torch.nan
    for step, options in STEP_CALLS:
        out = getattr(diffusion(), step)(model, x, t, **options)
        for value in out.values():
            assert value[1].isnan().any()
            assert not value[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_philox_repeats_and_draws_one_number_a_step(eta):
    d = diffusion(noise="philox")
    first, state = seeded(d.ddim_sample_loop, model, SHAPE, eta=eta)
    again, _ = seeded(d.ddim_sample_loop, model, SHAPE, eta=eta)
    assert torch.equal(first, again)
    _, expected = seeded(lambda: [torch.randint(2**63 - 1, ()) for _ in range(STEPS + 1 if eta else 1)])
    assert torch.equal(state, expected)
    torch.manual_seed(12)
    assert not torch.equal(d.ddim_sample_loop(model, SHAPE, eta=eta), first)


def test_philox_noise_is_normal_and_new_at_every_step():
    d = diffusion(noise="philox", mean=ModelMeanType.START_X, variance=ModelVarType.FIXED_LARGE)
    x, t = torch.zeros(64, 3, 8, 8), torch.full((64,), 10)
    first, second = (d.p_sample(mean_model, x, t)["sample"] for _ in range(2))
    known = d.p_mean_variance(mean_model, x, t)
    for sample in (first, second):
        z = (sample - known["mean"]) / known["variance"].sqrt()
        assert abs(z.mean()) < 0.04  # 4.4 standard errors
        assert abs(z.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.04
    x0 = torch.zeros(64, 3, 8, 8)
    noised, _ = seeded(d.q_sample, x0, t)
    assert torch.equal(noised, seeded(d.q_sample, x0, t)[0])
    assert abs(noised.std() / d.sqrt_one_minus_alphas_cumprod[10] - 1) < 0.03


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_sample_alike_and_apart(copied):
    d = diffusion(SpacedDiffusion, {0, 5, 10, 19})
    x, t = inputs(t=(0, 1, 2, 3))
    expected, _ = seeded(d.p_sample, model, x, t)
    twin = copied(d)
    out, _ = seeded(twin.p_sample, model, x, t)
    assert torch.equal(out["sample"], expected["sample"])
    with pytest.raises(ValueError, match="read-only"):
        twin.betas[0] = 0.5
    twin.posterior_mean_coef1 = 2 * twin.posterior_mean_coef1
    assert not torch.equal(seeded(twin.p_sample, model, x, t)[0]["sample"], expected["sample"])
    assert torch.equal(seeded(d.p_sample, model, x, t)[0]["sample"], expected["sample"])


def test_inference_mode():
    x, t = inputs()
    expected, _ = seeded(diffusion().p_sample, model, x, t)
    with torch.inference_mode():
        out, _ = seeded(diffusion().p_sample, model, x, t)
        looped = diffusion().ddim_sample_loop(model, SHAPE)
    assert torch.equal(out["sample"], expected["sample"])
    assert looped.isfinite().all()


@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_gradients_reach_x_and_the_model_through_sample_and_x0(step, options):
    """Guidance through x0, as in diffusion posterior sampling, differentiates pred_xstart."""
    x, t = inputs()
    x = x.double().requires_grad_()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def both(x, weight):
        torch.manual_seed(3)
        out = getattr(diffusion(), step)(lambda x, t: weight * model(x, t), x, t, clip_denoised=False, **options)
        return out["sample"], out["pred_xstart"]

    assert torch.autograd.gradcheck(both, (x, weight))
    assert not getattr(diffusion(), step)(model, x.detach(), t, **options)["sample"].requires_grad


@pytest.mark.parametrize(("step", "options"), STEP_CALLS)
def test_under_compile_and_transforms(step, options):
    x, t = inputs()
    d = diffusion(SpacedDiffusion, range(STEPS))

    def stepped(x):
        return getattr(d, step)(model, x, t, clip_denoised=False, **options)["sample"]

    # Compiled first, when nothing that a first step makes is there.
    compiled, _ = seeded(torch.compile(stepped, backend="eager"), x)
    expected, _ = seeded(stepped, x)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=2e-5)
    batched, _ = seeded(torch.func.vmap(stepped, randomness="same"), torch.stack([x, x]))
    torch.testing.assert_close(batched[1], expected, rtol=1e-5, atol=2e-5)
    (_, tangent), _ = seeded(torch.func.jvp, stepped, (x,), (torch.ones_like(x),))
    h = 1e-3
    (above, _), (below, _) = (seeded(stepped, x + s * h) for s in (1, -1))
    torch.testing.assert_close(tangent, (above - below) / (2 * h), rtol=0.02, atol=0.02)


def recording_device(seen):
    def network(x, t):
        seen.append(t.device.type)
        raise InterruptedError

    return network


def test_the_device_is_the_models_noises_or_the_cpu():
    class OnMeta(torch.nn.Linear):
        def forward(self, x, t):
            assert x.device.type == t.device.type == "meta"
            raise InterruptedError

    with pytest.raises(InterruptedError):
        diffusion().p_sample_loop(OnMeta(1, 1, device="meta"), SHAPE)
    for noise, device in ((None, "cpu"), (torch.empty(SHAPE, device="meta"), "meta")):
        seen = []
        with pytest.raises(InterruptedError):
            diffusion().p_sample_loop(recording_device(seen), SHAPE, noise=noise)
        assert seen == [device]
