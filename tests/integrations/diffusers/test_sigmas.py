"""What the schedulers share that count steps and keep noise levels: tables, counting, noise for image-to-image."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from diffkern.backends import unavailable, use_backend
from tests.golden_data import error
from tests.integrations.diffusers.cases import HostRead, diffusers, no_host_reads, ours, pair

EULERS = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
EXPLODING = [*EULERS, "HeunDiscreteScheduler"]
ALL = [*EXPLODING, "PNDMScheduler"]


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(name, steps=6, **extra):
    scheduler = getattr(ours, name)(**extra)
    scheduler.set_timesteps(steps)
    return scheduler


def step(scheduler, t, x):
    """One step at which the network said the sine of its input."""
    output = scheduler.scale_model_input(x, t).sin()
    source = {"generator": seeded()} if type(scheduler).__name__ in EULERS else {}
    return scheduler.step(output, t, x, **source)


def seeded():
    return torch.Generator().manual_seed(0)


def run(scheduler, x, timesteps=None):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = step(scheduler, t, x).prev_sample
    return x


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("name", ALL)
def test_steps_do_not_wait_for_the_host(name, noise, x):
    scheduler = made(name, noise=noise)
    with no_host_reads():
        run(scheduler, x)
    scheduler = made(name, noise=noise)
    order = scheduler.order
    with no_host_reads():  # as image-to-image pipelines slice them
        run(scheduler, x, scheduler.timesteps[2 * order :])
    if name in EXPLODING:
        scheduler = made(name, noise=noise)
        scheduler.set_begin_index(0)
        with no_host_reads():
            run(scheduler, x, [t.clone() for t in scheduler.timesteps])
        scheduler = made(name, noise=noise)
        with pytest.raises(HostRead), no_host_reads():
            step(scheduler, scheduler.timesteps[0].clone(), x)
    if name == EULERS[0]:
        scheduler = made(name, noise=noise)
        with no_host_reads():
            t = scheduler.timesteps[0]
            scheduler.step(scheduler.scale_model_input(x, t), t, x, s_churn=1.0, generator=seeded())


@pytest.mark.parametrize("name", ALL)
def test_backends_agree(name, x):
    if reason := unavailable("native"):
        pytest.skip(reason)
    ends = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            ends.append(run(made(name), x).numpy())
    assert error(ends[0], ends[1]) < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ALL)
def test_copies_go_on_alike(name, copied, x):
    scheduler = made(name)
    for t in scheduler.timesteps[:3]:
        x = step(scheduler, t, x).prev_sample
    twin = copied(scheduler)
    assert torch.equal(run(twin, x, twin.timesteps[3:]), run(scheduler, x, scheduler.timesteps[3:]))


def written(scheduler):
    """The config but for the list of what was not given, whose order is any."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


@pytest.mark.parametrize("name", ALL)
def test_configs_go_both_ways(name, tmp_path):
    config = {"beta_schedule": "scaled_linear", "steps_offset": 1, "prediction_type": "v_prediction"}
    theirs, mine = getattr(diffusers, name)(**config), getattr(ours, name)(**config, noise="philox")
    assert written(mine) == written(theirs)
    assert written(getattr(ours, name).from_config(theirs.config)) == written(theirs)
    mine.save_pretrained(tmp_path)
    for cls in (getattr(ours, name), getattr(diffusers, name)):
        assert dict(cls.from_pretrained(tmp_path).config)["prediction_type"] == "v_prediction"
    assert getattr(diffusers, name) in mine.compatibles
    for other in ALL:
        assert getattr(ours, other).from_config(mine.config).config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("name", ALL)
def test_before_set_timesteps(name):
    theirs, mine = pair(name)
    assert (mine.timesteps is None) == (theirs.timesteps is None)
    if theirs.timesteps is not None:
        assert mine.timesteps.dtype == theirs.timesteps.dtype
        assert torch.equal(mine.timesteps, theirs.timesteps)
        np.testing.assert_allclose(mine.sigmas, theirs.sigmas, rtol=3e-4)
    np.testing.assert_allclose(float(mine.init_noise_sigma), float(theirs.init_noise_sigma), rtol=1e-5)
    assert len(mine) == len(theirs) == 1000


@pytest.mark.parametrize("way", ["assigned", "list", "written to"])
@pytest.mark.parametrize("name", EXPLODING)
def test_replaced_sigmas_take_effect(name, way, x):
    """Also after steps were made with the old ones."""
    theirs, mine = pair(name)
    ends = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
        step(scheduler, scheduler.timesteps[0], x)
        scheduler.set_timesteps(4)
        new = scheduler.sigmas * 0.8 + 0.01
        if way == "assigned":
            scheduler.sigmas = new
        elif way == "list" and scheduler is mine:
            scheduler.sigmas = new.tolist()
        else:
            scheduler.sigmas.copy_(new)
        ends.append(run(scheduler, x))
    assert error(ends[1].numpy(), ends[0].numpy()) < 2e-5


@pytest.mark.parametrize("name", EXPLODING)
def test_reading_and_moving_sigmas_changes_nothing(name, x):
    expected = run(made(name), x)
    scheduler = made(name)
    levels = scheduler._levels
    scheduler.sigmas = scheduler.sigmas.clone()
    assert scheduler._levels is levels
    assert torch.equal(run(scheduler, x), expected)


@pytest.mark.parametrize("name", EXPLODING)
def test_where_a_timestep_is(name):
    theirs, mine = pair(name)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    for t in theirs.timesteps:
        assert mine.index_for_timestep(t) == theirs.index_for_timestep(t)
        assert mine.index_for_timestep(t.item()) == theirs.index_for_timestep(t)
    other = torch.tensor([3.0, 2.0, 2.0, 1.0])
    for t in (3, 2.0, torch.tensor(2), torch.tensor(1.0)):
        assert mine.index_for_timestep(t, other) == theirs.index_for_timestep(t, other)
    with pytest.raises(ValueError, match=r"timestep is 5\.5; it must be one of the schedule's: \[999"):
        mine.index_for_timestep(5.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EXPLODING)
def test_noise_to_start_from(name, dtype, x):
    """At the timesteps given; once a run's beginning is set, there; once it is under way, where it is."""
    theirs, mine = pair(name)
    noise = torch.randn_like(x)
    expected, actual = [], []
    for scheduler, results in ((theirs, expected), (mine, actual)):
        scheduler.set_timesteps(7)
        exact = scheduler is theirs
        clean, fresh = (tensor.to(dtype).double() if exact else tensor.to(dtype) for tensor in (x, noise))
        t = scheduler.timesteps
        results.append(scheduler.add_noise(clean, fresh, t[[3, 6]]))
        results.append(scheduler.add_noise(clean, fresh, t[2:3]))
        scheduler.set_begin_index(4)
        results.append(scheduler.add_noise(clean, fresh, t[2:3]))
        step(scheduler, t[4], clean)
        results.append(scheduler.add_noise(clean, fresh, t[2:3]))
    for theirs_x, mine_x in zip(expected, actual, strict=True):
        assert mine_x.dtype == dtype
        assert error(mine_x.double().numpy(), theirs_x.double().numpy()) < max(1e-6, torch.finfo(dtype).eps)


def test_noise_that_cannot_be_placed(x):
    scheduler = made("EulerDiscreteScheduler")
    with pytest.raises(ValueError, match="timestep is 17"):
        scheduler.add_noise(x, x, torch.tensor([17.0, 999.0]))


@pytest.mark.parametrize("name", EULERS)
def test_integers_are_no_timesteps(name, x):
    scheduler = made(name)
    for t in (0, np.int64(0), torch.tensor(0), torch.tensor(0, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"an integer; .* must be given one of its `timesteps`, not their index"):
            scheduler.step(x, t, x)


@pytest.mark.parametrize("name", EULERS)
def test_a_network_that_saw_an_unscaled_state_is_warned_of(name, x, caplog):
    scheduler = made(name)
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    library = diffusers.utils.logging.get_logger("diffkern")
    library.addHandler(caplog.handler)
    try:
        scheduler.step(x, scheduler.timesteps[0], x)
        assert "without scale_model_input" in caplog.text
        caplog.clear()
        scheduler = made(name)
        step(scheduler, scheduler.timesteps[0], x)
        assert not caplog.records
    finally:
        logger.removeHandler(caplog.handler)
        library.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", EXPLODING)
def test_a_step_after_the_last(name, x):
    scheduler = made(name, 3)
    run(scheduler, x)
    with pytest.raises(ValueError, match="steps were made; call set_timesteps before another run"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_conversions_of_levels(name):
    theirs, mine = pair(name, {"beta_schedule": "scaled_linear"})
    sigmas = np.linspace(12, 0.1, 20)
    for kind in ("karras", "exponential", "beta"):
        for n in (1, 2, 9):
            expected = getattr(theirs, f"_convert_to_{kind}")(sigmas, n)
            np.testing.assert_allclose(getattr(mine, f"_convert_to_{kind}")(sigmas, n), expected, rtol=1e-9)
    log_sigmas = np.log(mine._sigma_table())
    levels = np.array([1e-12, 0.01, 0.5, 3.3, 14.0, 100.0])
    np.testing.assert_allclose(mine._sigma_to_t(levels, log_sigmas), theirs._sigma_to_t(levels, log_sigmas), atol=1e-9)


@pytest.mark.parametrize(("sample", "output"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("name", ALL)
def test_dtypes_as_diffusers(name, sample, output, x):
    theirs, mine = pair(name)
    results = []
    for scheduler in (getattr(diffusers, name)(), mine):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        results.append(scheduler.step(x.sin().to(output), t, x.to(sample)).prev_sample)
    assert results[1].dtype == results[0].dtype
    assert theirs.config == mine.config


@pytest.mark.parametrize("name", EXPLODING)
def test_devices_of_what_users_read(name):
    scheduler = made(name)
    assert scheduler.sigmas.device.type == "cpu"
    assert isinstance(scheduler.init_noise_sigma, torch.Tensor)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.set_timesteps(5)
    assert scheduler.begin_index is None


@pytest.mark.parametrize("name", ALL)
def test_trailing_timesteps_are_as_many_as_asked_for(name):
    """29 of 100: diffusers rounds its way to a thirtieth, −1."""
    scheduler = made(name, 29, num_train_timesteps=100, timestep_spacing="trailing")
    distinct = np.unique(np.asarray(scheduler.timesteps))
    assert distinct.min() >= 0
    if name != "PNDMScheduler":
        assert len(distinct) == 29
    assert scheduler.timesteps[0] == 99


def test_levels_at_the_end_of_a_table_that_falls_there():
    """Zero terminal SNR held off at 4096, below the level before it: the largest level is that of T − 1."""
    scheduler = ours.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    table = scheduler._sigma_table()
    assert table[-1] < table[-2]
    assert scheduler._sigma_to_t(table[-1], np.log(table)) == 999


@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_timesteps_of_spaced_levels_are_those_of_diffusers(spacing, rescale_betas_zero_snr):
    """To the bit: of the several timesteps with one level that zero terminal SNR has, float32 finds the one."""
    config = {spacing: True, "rescale_betas_zero_snr": rescale_betas_zero_snr, "timestep_spacing": "trailing"}
    theirs, mine = (module.EulerDiscreteScheduler(**config) for module in (diffusers, ours))
    for steps in (3, 10, 30):
        theirs.set_timesteps(steps)
        mine.set_timesteps(steps)
        assert torch.equal(mine.timesteps, theirs.timesteps)


@pytest.mark.parametrize("name", ALL)
def test_add_noise_broadcasts(name):
    """One noise for all samples, one sample for all noises; the promoted dtype."""
    theirs, mine = (getattr(module, name)() for module in (diffusers, ours))
    x, noise = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    t = mine.timesteps[[0, 1, 3, 2]]
    for first, second in ((x, noise[:1]), (x[:1], noise), (x, noise.double())):
        expected = theirs.add_noise(first, second, t)
        actual = mine.add_noise(first, second, t)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


SIGMAS = [*EXPLODING, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


@pytest.mark.parametrize("beta_end", [2.0, float("nan")])
@pytest.mark.parametrize("name", SIGMAS)
def test_betas_that_give_no_levels(name, beta_end, x):
    """They may be had, as diffusers' tests do, but no step be made of them."""
    scheduler = made(name, 5, beta_start=0.1, beta_end=beta_end)
    with pytest.raises(ValueError, match=r"sigmas\[0\] is (inf|nan); .* betas\s+lie in \[0, 1\)"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", SIGMAS)
def test_betas_fewer_than_the_timesteps(name, x):
    """The last level holds beyond, as in diffusers."""
    theirs, mine = (getattr(module, name)(trained_betas=[0.1, 0.2, 0.3]) for module in (diffusers, ours))
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    assert torch.equal(mine.sigmas, theirs.sigmas)
