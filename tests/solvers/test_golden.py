"""Programs against the numbers of guided-diffusion and diffusers."""

import functools

import numpy as np
import pytest

from diffkern.process import GaussianProcess, make_betas
from diffkern.solvers import SOLVERS, build
from tests.golden_data import error, load
from tests.solvers.executor import execute, new_slots
from tests.stub_networks import net

GUIDED = load("guided_gaussian")
DIFFUSERS = load("diffusers_schedulers")
PROCS = {proc["key"]: proc for proc in GUIDED.meta["procs"]}
PREDICTIONS = {"EPSILON": "eps", "START_X": "x0"}
CLIPS = {"clip0": None, "clip1": (-1.0, 1.0)}
STEPS = [
    (key, mean, variance, clip)
    for key in PROCS
    for mean in PREDICTIONS
    for variance in ("FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")
    for clip in CLIPS
    if f"{key}/{mean}/{variance}/{clip}/mean" in GUIDED
]


def process_of(key, mean, variance):
    proc = PROCS[key]
    process = GaussianProcess(make_betas(proc["schedule"], proc["T"]), PREDICTIONS[mean], variance.lower())
    return process.respace(proc["respacing"]) if proc["respacing"] else process


def run_at(program, t, x, output, noise):
    """Execute for each sample the row of its own t, and put the samples together."""
    steps = [
        execute(program, program.num_rows - 1 - int(t[i]), x[i : i + 1], output[i : i + 1], noise[i : i + 1])
        for i in range(len(t))
    ]
    return [None if parts[0] is None else np.concatenate(parts) for parts in zip(*steps, strict=True)]


@pytest.mark.parametrize(("key", "mean", "variance", "clip"), STEPS)
def test_openai_single_steps(key, mean, variance, clip):
    case = f"{key}/{mean}/{variance}"
    process = process_of(key, mean, variance)
    t = GUIDED[f"{key}/t"]
    x, noise = (GUIDED[f"inputs/{name}"].astype(np.float64) for name in ("x_t", "step_noise"))
    output = GUIDED[f"{case}/model_output"].astype(np.float64)
    program = build("ddpm", process, clip=CLIPS[clip])
    np.testing.assert_array_equal(program.times[program.num_rows - 1 - t], GUIDED[f"{case}/model_t"])

    sample, mean_, x0, log_variance = run_at(program, t, x, output, noise)
    assert error(mean_, GUIDED[f"{case}/{clip}/mean"]) < 2e-6
    assert error(sample, GUIDED[f"{case}/{clip}/p_sample"]) < 2e-6
    assert error(x0, GUIDED[f"{case}/{clip}/pred_xstart"]) < 2e-6
    if log_variance is None:
        log_variance = np.broadcast_to(process.model_log_variance[t].reshape(-1, 1, 1, 1), x.shape)
    assert error(log_variance, GUIDED[f"{case}/{clip}/log_variance"]) < 2e-6

    for eta in (0.0, 0.5):
        if f"{case}/{clip}/ddim_eta{eta}" in GUIDED:
            program = build("ddim", process, clip=CLIPS[clip], eta=eta)
            sample = run_at(program, t, x, output, noise)[0]
            expected = GUIDED[f"{case}/{clip}/ddim_eta{eta}"]
            # At t = 1 the peer computes √(1 − ᾱ_0) and its re-derived eps in float32, from differences of nearly equal
            # numbers. (The same expressions in float32 give its numbers to 2e-7.)
            assert error(sample[2:], expected[2:]) < 4e-6
            assert error(sample, expected) < 1.5e-4


LOOPS = [
    (loop, solver)
    for loop in GUIDED.meta["loops"]
    for solver in ("p_sample_loop", "ddim_loop_eta0.0", "ddim_loop_eta0.5")
    if f"{loop}/{solver}/samples" in GUIDED
]


@pytest.mark.parametrize(("loop", "solver"), LOOPS)
def test_openai_loops(loop, solver):
    _, key, mean, variance, clip = loop.split("/")
    process = process_of(key, mean, variance)
    if solver == "p_sample_loop":
        program = build("ddpm", process, clip=CLIPS[clip])
    else:
        program = build("ddim", process, clip=CLIPS[clip], eta=float(solver[-3:]))
    network = functools.partial(
        net, **{k: GUIDED.meta["stub"][k] for k in "abw"}, var="range" if variance == "LEARNED_RANGE" else None
    )
    x = GUIDED["loops/x_T"].astype(np.float64)
    has_noise = f"{loop}/{solver}/noise" in GUIDED
    noise = GUIDED[f"{loop}/{solver}/noise"] if has_noise else np.zeros((program.num_rows, *x.shape))
    kept, samples = GUIDED[f"{loop}/{solver}/kept"].tolist(), GUIDED[f"{loop}/{solver}/samples"]
    for row in range(program.num_rows):
        x = execute(program, row, x, network(x, np.full(len(x), program.times[row])), noise[row]).x
        if row in kept:
            assert error(x, samples[kept.index(row)]) < 2e-5, row


# diffusers' cases with the same semantics; DDIM clips and re-derives eps only with use_clipped_model_output, and
# dynamic thresholding with a largest value of 1, as in dpmpp_2m_thresh, is clipping. (DPM-Solver++ has no clip_sample.)
@pytest.mark.parametrize(
    "case",
    [
        "ddpm_small",
        "ddpm_small_1000",
        "ddpm_large",
        "ddpm_learned_range",
        "ddpm_v_linspace",
        "ddpm_sample_trailing",
        "ddpm_noclip",
        "ddpm_zero_snr",
        "ddpm_custom_timesteps",
        "ddim_eta0_clipped_model_output",
        "ddim_v_zero_snr",
        "dpmpp_2m",
        "dpmpp_2m_thresh",
    ],
)
def test_diffusers_loops(case):
    timesteps = DIFFUSERS[f"{case}/timesteps"]
    info = next(c for c in DIFFUSERS.meta["cases"] if c["key"] == case)
    config = info["config"]
    prediction = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[config.get("prediction_type", "epsilon")]
    process = GaussianProcess(DIFFUSERS[f"{case}/betas"], prediction, config.get("variance_type", "fixed_small")).keep(
        timesteps[::-1]
    )
    solver = next(name for name in SOLVERS if case.startswith(name))
    clips = config.get("thresholding", False) if solver == "dpmpp_2m" else config.get("clip_sample", True)
    program = build(solver, process, clip=(-1, 1) if clips else None)
    assert program.times.tolist() == timesteps.tolist()

    network = functools.partial(net, **{k: DIFFUSERS.meta["stub"][k] for k in "abw"}, var=info["stub_var"])
    x = DIFFUSERS[f"{case}/x_init"].astype(np.float64)
    noise = np.zeros((program.num_rows, *x.shape))
    if info["n_draws"]:
        noise[: info["n_draws"]] = DIFFUSERS[f"{case}/noise"]
    slots = new_slots(program, x)
    kept, samples = DIFFUSERS[f"{case}/kept"].tolist(), DIFFUSERS[f"{case}/x"]
    for row in range(program.num_rows):
        x = execute(program, row, x, network(x, np.full(len(x), program.times[row])), noise[row], slots).x
        if row in kept:
            assert error(x, samples[kept.index(row)]) < 3e-5, row
