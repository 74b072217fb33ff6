"""DPMSolverMultistepScheduler and UniPCMultistepScheduler in use: what may be given, replaced and called by itself."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests.golden_data import error
from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import network, no_host_reads

DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
BOTH = [DPM, UNIPC]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]


def run(scheduler, steps=6, start=None, begin=0, timesteps=None, **source):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if start is None else start
    if steps is not None:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **source)[0]
    return x


def close(actual, expected, tolerance=5e-5):
    """Equal to `tolerance` of the largest value, and in dtype and shape; diffusers' tables are float32."""
    assert actual.dtype == expected.dtype
    assert error(actual.double().numpy(), expected.double().numpy()) < tolerance


@pytest.mark.parametrize("name", BOTH)
def test_no_host_reads(name):
    scheduler = getattr(cases.ours, name)()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 3, 4, 4)
    outputs = [network(x, t) for t in scheduler.timesteps]
    with no_host_reads():
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            x = scheduler.step(output, t, x).prev_sample


def test_sde_noise():
    """float32 from the generator, whatever the dtypes; given; by a list of generators; or a counter's."""
    theirs, mine = (getattr(side, DPM)(algorithm_type="sde-dpmsolver++") for side in (cases.diffusers, cases.ours))
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    close(run(mine, generator=seeds), run(theirs, generator=[torch.Generator().manual_seed(s) for s in (1, 2)]))
    noise = torch.randn(2, 3, 8, 8)
    close(run(mine, variance_noise=noise), run(theirs, variance_noise=noise))
    half, source = torch.randn(2, 3, 8, 8).half(), torch.Generator().manual_seed(3)
    close(
        run(mine, start=half, generator=source),
        run(theirs, start=half, generator=torch.Generator().manual_seed(3)),
        tolerance=2e-2,
    )
    drawn = torch.Generator().manual_seed(3)
    for _ in range(6):
        torch.randn(2, 3, 8, 8, generator=drawn)
    assert torch.equal(source.get_state(), drawn.get_state())
    counted = getattr(cases.ours, DPM)(algorithm_type="sde-dpmsolver++", noise="philox")
    first, again = (run(counted, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, run(counted, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("name", BOTH)
def test_configs_travel(name, tmp_path):
    options = {"solver_order": 3, "use_karras_sigmas": True, "prediction_type": "v_prediction"}
    mine, theirs = getattr(cases.ours, name)(**options), getattr(cases.diffusers, name)(**options)
    assert {k: v for k, v in mine.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    mine.save_pretrained(tmp_path)
    loaded = getattr(cases.ours, name).from_pretrained(tmp_path)
    assert all(loaded.config[key] == value for key, value in mine.config.items() if key[0] != "_")
    assert torch.equal(run(loaded), run(mine))
    close(run(getattr(cases.diffusers, name).from_pretrained(tmp_path)), run(mine))
    assert mine.compatibles


def test_from_each_others_configs():
    """Solver types are mapped; flags of another class that the config still holds do nothing."""
    dpm = getattr(cases.ours, DPM)(use_lu_lambdas=True, solver_type="heun", solver_order=3)
    uni = getattr(cases.ours, UNIPC).from_config(dpm.config)
    assert uni.config.solver_type == "bh2"
    close(run(uni), run(getattr(cases.diffusers, UNIPC)(solver_order=3)))
    back = getattr(cases.ours, DPM).from_config(uni.config)
    assert back.config.solver_type == "midpoint"
    assert back.config.use_lu_lambdas
    assert getattr(cases.ours, DPM)(algorithm_type="deis", solver_type="bh1").config.algorithm_type == "dpmsolver++"


@pytest.mark.parametrize("name", BOTH)
def test_history_is_the_users_too(name):
    """Predictions can be read, replaced, and are not overwritten."""
    mine, theirs = (getattr(side, name)(solver_order=3) for side in (cases.ours, cases.diffusers))
    given = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    kept = [one.clone() for one in given]
    x = torch.randn(2, 3, 8, 8)
    results = []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(4)
        scheduler.model_outputs = list(given)
        scheduler.lower_order_nums = 3
        if name == UNIPC:
            scheduler.last_sample, scheduler.this_order = given[0], 3
        y, seen = x, []
        for t in scheduler.timesteps[4:8]:
            y = scheduler.step(network(y, t), t, y).prev_sample
            seen += [y, *scheduler.model_outputs]
            if name == UNIPC:
                seen.append(scheduler.last_sample)
        results.append(seen)
    for ours_, theirs_ in zip(*results, strict=True):
        close(ours_, theirs_)
    assert all(torch.equal(*pair) for pair in zip(given, kept, strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_replaced_tables_take_effect(name):
    mine, theirs = (getattr(side, name)() for side in (cases.ours, cases.diffusers))
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(4)
        scheduler.sigmas = torch.tensor([8.0, 3.0, 1.0, 0.3, 0.0])
        scheduler.timesteps = torch.tensor([900, 500, 200, 50])
    close(run(mine, None), run(theirs, None))


@pytest.mark.parametrize("cut", [slice(2, None), slice(None, 4)], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_a_run_cut_short_ends_in_lower_order(name, cut):
    """Steps are counted by `timesteps`, also where only those were sliced."""
    mine, theirs = (getattr(side, name)(solver_order=3) for side in (cases.ours, cases.diffusers))
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(20)
        scheduler.timesteps = scheduler.timesteps[cut]
    close(run(mine, None), run(theirs, None))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("flow", [False, True])
def test_add_noise(name, flow):
    mine, theirs = (getattr(side, name)(use_flow_sigmas=flow) for side in (cases.ours, cases.diffusers))
    x0, noise = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(7)

    def both(timesteps):
        close(mine.add_noise(x0, noise, timesteps), theirs.add_noise(x0, noise, timesteps))

    both(mine.timesteps[[1, 4]])
    both(mine.timesteps[2:3])
    for scheduler in (mine, theirs):
        scheduler.set_begin_index(3)
    both(mine.timesteps[:2])
    for scheduler in (mine, theirs):
        scheduler.step(noise, scheduler.timesteps[3], x0)
    both(mine.timesteps[:2])


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
def test_the_parts_of_a_step(algorithm):
    """convert_model_output and the updates of each order, which pipelines call by themselves."""
    options = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min", "solver_order": 3}
    mine, theirs = (getattr(side, DPM)(**options) for side in (cases.ours, cases.diffusers))
    x, noise, outputs = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), [torch.randn(2, 3, 8, 8) for _ in range(3)]
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(5)
        scheduler._init_step_index(scheduler.timesteps[0])
    given = {"sample": x, "noise": noise if algorithm.startswith("sde-") else None}
    close(mine.convert_model_output(outputs[0], sample=x), theirs.convert_model_output(outputs[0], sample=x))
    for update, argument in (
        ("dpm_solver_first_order_update", outputs[-1]),
        ("multistep_dpm_solver_second_order_update", outputs),
        ("multistep_dpm_solver_third_order_update", outputs),
    ):
        close(getattr(mine, update)(argument, **given), getattr(theirs, update)(argument, **given))
    with pytest.raises(ValueError, match="sample is None"):
        mine.convert_model_output(outputs[0])
    assert [mine._sigma_to_alpha_sigma_t(s) for s in mine.sigmas] == [
        theirs._sigma_to_alpha_sigma_t(s) for s in mine.sigmas
    ]


def test_thresholding_of_a_sample():
    mine, theirs = (
        getattr(side, DPM)(thresholding=True, sample_max_value=1.4) for side in (cases.ours, cases.diffusers)
    )
    x = 2 * torch.randn(3, 3, 8, 8)
    close(mine._threshold_sample(x), theirs._threshold_sample(x))


def test_timesteps_and_sigmas_given():
    mine, theirs = (getattr(side, DPM)() for side in (cases.ours, cases.diffusers))
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(timesteps=[951, 700, 300, 20])
    assert torch.equal(mine.timesteps, theirs.timesteps)
    close(run(mine, None), run(theirs, None))
    for options, given in (
        ({}, {"sigmas": np.array([1.0, 0.6, 0.2])}),
        ({"shift_terminal": 0.1, "flow_shift": 3.0}, {"sigmas": np.array([0.9, 0.6, 0.2])}),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 5, "mu": 0.7}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"num_inference_steps": 5, "mu": 0.7}),
    ):
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **options}
        mine, theirs = (getattr(side, UNIPC)(**options) for side in (cases.ours, cases.diffusers))
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(**given)
        assert torch.equal(mine.timesteps, theirs.timesteps)
        close(mine.sigmas, theirs.sigmas)
        close(run(mine, None), run(theirs, None))
    mine, theirs = (
        getattr(side, DPM)(use_flow_sigmas=True, use_dynamic_shifting=True) for side in (cases.ours, cases.diffusers)
    )
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(5, mu=0.7)
    close(mine.sigmas, theirs.sigmas)
    assert mine.config.flow_shift == pytest.approx(theirs.config.flow_shift)


@pytest.mark.parametrize("solver", ["DDIMScheduler", DPM])
def test_another_scheduler_predicts(solver):
    def make(side):
        return getattr(side, UNIPC)(solver_p=getattr(cases.diffusers, solver)(), solver_order=2)

    close(run(make(cases.ours)), run(make(cases.diffusers)))


def test_a_step_of_mixed_dtypes():
    """x of float32 with outputs of float16: what is remembered decides in diffusers."""
    x, half = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).half()
    for name, options in ((DPM, {}), (DPM, {"prediction_type": "sample"}), (UNIPC, {})):
        for sample, output in ((x, half), (half, x)):
            results = []
            for side in (cases.ours, cases.diffusers):
                scheduler = getattr(side, name)(**options)
                scheduler.set_timesteps(5)
                results.append(scheduler.step(output, scheduler.timesteps[0], sample).prev_sample)
            close(*results, tolerance=2e-2)


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_ends_in_x0_where_diffusers_has_nan(order, solver_type, lower_order_final):
    """At σ = 0: bh1's B is infinite there, and so are the ratios of a step of higher order."""
    scheduler = getattr(cases.ours, UNIPC)(
        solver_order=order, solver_type=solver_type, lower_order_final=lower_order_final, disable_corrector=[4]
    )
    x = run(scheduler)
    assert torch.isfinite(x).all()
    close(x, scheduler.model_outputs[-1])


def test_what_diffusers_cannot_run():
    """Steps of length 0 with Heun's coefficients (0/0 there), and order 3 of sde-dpmsolver (no such branch)."""
    empty = getattr(cases.ours, DPM)(solver_type="heun", use_karras_sigmas=True, final_sigmas_type="sigma_min")
    assert torch.isfinite(run(empty, 20)).all()
    third = getattr(cases.ours, DPM)(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")
    assert torch.isfinite(run(third)).all()


def test_pipelines_may_begin_anywhere():
    """A timestep that is not in the schedule is its last step, one that is there twice its second, as in diffusers."""
    for name in BOTH:
        mine, theirs = (getattr(side, name)() for side in (cases.ours, cases.diffusers))
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(5)
            scheduler.timesteps = torch.tensor([900, 500, 500, 200, 50])
        for timestep in (3, 500, torch.tensor(900), mine.timesteps[3], 50.0):
            assert mine.index_for_timestep(timestep) == theirs.index_for_timestep(timestep)
        assert mine.index_for_timestep(7, torch.tensor([8, 7])) == theirs.index_for_timestep(7, torch.tensor([8, 7]))


@pytest.mark.parametrize(
    ("name", "options", "steps", "message"),
    [
        (DPM, {"solver_order": 4}, {}, "solver_order is 4"),
        (UNIPC, {"solver_order": 0}, {}, "solver_order is 0"),
        (DPM, {"algorithm_type": "dpmsolver"}, {}, "final_sigmas_type is 'zero'"),
        (DPM, {"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "only one of them may be"),
        (UNIPC, {"shift_terminal": 0.1}, {}, "needs use_flow_sigmas"),
        (DPM, {}, {"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        (UNIPC, {}, {"num_inference_steps": 0}, "num_inference_steps is 0"),
        (UNIPC, {}, {"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        (DPM, {}, {}, "one of them must be given"),
        (DPM, {}, {"num_inference_steps": 3, "timesteps": [3]}, "one of them must be given"),
        (DPM, {}, {"timesteps": [1000, 3]}, "timesteps are \\[1000, 3\\]"),
        (DPM, {"use_karras_sigmas": True}, {"timesteps": [3]}, "timesteps cannot be given"),
        (DPM, {}, {"num_inference_steps": 3, "mu": 1.0}, "needs use_dynamic_shifting"),
        (DPM, {"timestep_spacing": "even"}, {"num_inference_steps": 3}, "timestep_spacing is 'even'; it may be one of"),
        (DPM, {"final_sigmas_type": "one"}, {"num_inference_steps": 3}, "final_sigmas_type is 'one'; it may be one of"),
        (UNIPC, {}, {}, "num_inference_steps is None"),
        (UNIPC, {}, {"sigmas": [1.0]}, "need use_flow_sigmas"),
        (UNIPC, {"use_dynamic_shifting": True}, {"num_inference_steps": 3}, "mu is None"),
        (
            UNIPC,
            {"time_shift_type": "cubic", "use_dynamic_shifting": True, "use_flow_sigmas": True},
            {"num_inference_steps": 3, "mu": 1.0},
            "time_shift_type is 'cubic'",
        ),
    ],
)
def test_what_they_do_not_take(name, options, steps, message):
    with pytest.raises(ValueError, match=message):
        getattr(cases.ours, name)(**options).set_timesteps(**steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DPM, {"algorithm_type": "dpm"}),
        (DPM, {"solver_type": "rk"}),
        (UNIPC, {"solver_type": "bh3"}),
        (UNIPC, {"beta_schedule": "no"}),
    ],
)
def test_unknown_names_list_the_known_ones(name, options):
    with pytest.raises(NotImplementedError, match="it may be one of"):
        getattr(cases.ours, name)(**options)


@pytest.mark.parametrize("name", BOTH)
def test_steps_that_cannot_be_made(name):
    scheduler, x = getattr(cases.ours, name)(), torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 1, x)
    run(scheduler, 3)
    with pytest.raises(ValueError, match="all 3 steps were made"):
        scheduler.step(x, 1, x)
    unknown = getattr(cases.ours, name)(prediction_type="score")
    unknown.set_timesteps(3)
    with pytest.raises(ValueError, match="prediction_type is 'score'; it may be one of"):
        unknown.step(x, unknown.timesteps[0], x)
    option = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"} if name == DPM else {"predict_x0": False}
    flow = getattr(cases.ours, name)(prediction_type="flow_prediction", **option)
    flow.set_timesteps(3)
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'"):
        flow.step(x, flow.timesteps[0], x)
    both = getattr(cases.ours, name)(use_exponential_sigmas=True, use_flow_sigmas=True)
    both.set_timesteps(3)
    with pytest.raises(ValueError, match="whose sigmas are at most 1"):
        both.step(x, both.timesteps[0], x)


def test_algorithms_that_diffusers_deprecates_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning, match="dpmsolver"):
            getattr(cases.ours, DPM)(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"sigmas": [0.2, 0.5, 1.0]}, "must fall and stay above 0"),
        ({}, {"sigmas": [1.0, 0.0]}, "must fall and stay above 0"),
        ({}, {"sigmas": [1.0, float("nan")]}, "must fall and stay above 0"),
        ({"shift_terminal": 0.1}, {"num_inference_steps": 1}, "shift_terminal .* two steps or more"),
    ],
    ids=str,
)
def test_flow_levels_that_cannot_be(options, call, message):
    scheduler = cases.ours.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **options)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**call)
