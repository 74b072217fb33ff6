"""DPMSolverMultistepScheduler and UniPCMultistepScheduler against diffusers: stored trajectories and every option."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

from diffkern import backends
from tests.golden_data import error
from tests.integrations.diffusers import cases
from tests.integrations.diffusers.cases import (
    check_close,
    check_golden,
    golden_cases,
    key_of,
    network,
    pairwise,
    states,
)

DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
BOTH = [DPM, UNIPC]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

SHARED = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "num_train_timesteps": [1000, 100],
    "solver_order": [1, 2, 3],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.8, 0.0],
    "sample_max_value": [1.0, 1.5, 0.5],
    "lower_order_final": [True, False],
    "flow_shift": [1.0, 3.0],
    "final_sigmas_type": ["zero", "sigma_min"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "steps": [2, 9, 14, 15],
}
SPACINGS = [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"]
OPTIONS = {
    DPM: {
        **SHARED,
        "spacing": [*SPACINGS, "use_lu_lambdas"],
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
        "solver_type": ["midpoint", "heun", "logrho"],
        "euler_at_final": [False, True],
        "lambda_min_clipped": [-float("inf"), -5.1],
    },
    UNIPC: {
        **SHARED,
        "spacing": SPACINGS,
        "predict_x0": [True, False],
        "solver_type": ["bh1", "bh2", "midpoint"],
        "disable_corrector": [[], [0], [1, 3]],
        "sigma_min": [None, 0.1],
        "sigma_max": [None, 20.0],
    },
}


def makes_sense(name, config):
    """Whether diffusers can run the config: not what it refuses, nor where it divides by 0 or takes the root of −1."""
    flow, spacing = config["spacing"] == "use_flow_sigmas", config["spacing"]
    if name == DPM:
        data = config["algorithm_type"] in ("dpmsolver++", "sde-dpmsolver++")
        if (not data and config["final_sigmas_type"] == "zero") or (
            config["algorithm_type"] == "sde-dpmsolver" and config["solver_order"] == 3
        ):
            return False
        divides = config["solver_type"] == "heun" or config["solver_order"] == 3
        if divides and spacing and config["final_sigmas_type"] == "sigma_min":
            return False  # its last step has length 0
    else:
        data = config["predict_x0"]
        last_order = 1 if config["lower_order_final"] else config["solver_order"]
        if config["final_sigmas_type"] == "zero" and (last_order > 1 or config["solver_type"] == "bh1" or not data):
            return False
        if last_order > 2 and (flow or spacing):
            return False  # its last step has length 0
    return data or config["prediction_type"] != "flow_prediction"


def with_spacing(config):
    """(arguments of the constructor, steps)."""
    options = {key: value for key, value in config.items() if key not in ("steps", "spacing")}
    return options | ({config["spacing"]: True} if config["spacing"] else {}), config["steps"]


def configs(name):
    """Those of all pairs of options that diffusers can run; it cannot where a timestep is repeated."""
    found = []
    for config in pairwise(OPTIONS[name], seed=0) + pairwise(OPTIONS[name], seed=1):
        if makes_sense(name, config):
            options, steps = with_spacing(config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = getattr(cases.diffusers, name)(**options)
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps.unique()) == steps:
                found.append(config)
    return found


def compare(name, config, steps, *, tolerance=3e-6, shape=(2, 3, 8, 8), dtype=torch.float32, begin=0, **layout):
    """Timesteps of the two, and every step of ours against diffusers' own made in float64 of the same operands.

    `tolerance` is relative to the largest value. Where a prediction of noise is remembered in float32 and multiplied by
    1e4, no float32 step is that near; then it is twice the error of diffusers' own.
    """
    theirs, mine = getattr(cases.diffusers, name)(**config), getattr(cases.ours, name)(**config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(steps)
    assert mine.timesteps.dtype == theirs.timesteps.dtype
    assert torch.equal(mine.timesteps, theirs.timesteps)
    # diffusers' ᾱ are float32, and so are its differences of them, which is no matter of the steps.
    mine.alphas_cumprod = theirs.alphas_cumprod
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(steps)
        if begin:
            scheduler.set_begin_index(begin)
    assert torch.equal(mine.timesteps, theirs.timesteps)
    assert mine.sigmas.dtype == theirs.sigmas.dtype
    np.testing.assert_allclose(mine.sigmas, theirs.sigmas, rtol=1e-6)
    single = copy.deepcopy(theirs)
    theirs.sigmas = theirs.sigmas.double()
    stochastic = config.get("algorithm_type", "").startswith("sde-")
    sources = [{"generator": torch.Generator().manual_seed(1)} if stochastic else {} for _ in range(3)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(**layout)
    with torch.no_grad():
        for i, t in enumerate(mine.timesteps[begin:], begin):
            var = (
                "range"
                if config.get("variance_type") and config.get("prediction_type", "epsilon") == "epsilon"
                else None
            )
            output = network(x.double(), t, var=var).to(dtype).to(**layout)
            before = output.clone(), x.clone()
            expected = theirs.step(output.double(), t, x.double(), **sources[0]).prev_sample
            peers = single.step(output, t, x, **sources[1]).prev_sample
            actual = mine.step(output, t, x, **sources[2]).prev_sample
            assert torch.equal(output, before[0])
            assert torch.equal(x, before[1])
            peers_error = error(peers.double().numpy(), expected.numpy()) if dtype == torch.float32 else 0.0
            rounding = 8 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
            allowed = max(tolerance, 2 * peers_error, rounding)
            check_close(actual, expected, x, allowed, f"step {i}; diffusers' error is {peers_error:.1e}")
            x = expected.to(dtype).to(**layout)
            assert mine.step_index == theirs.step_index
            assert mine.lower_order_nums == theirs.lower_order_nums
            for ours_, theirs_ in zip(mine.model_outputs, theirs.model_outputs, strict=True):
                assert (ours_ is None) == (theirs_ is None)
    assert states(sources[2]) == states(sources[0])


@pytest.mark.parametrize(
    ("name", "case"),
    [(n, c) for n in BOTH for c in golden_cases(n)],
    ids=lambda v: v if isinstance(v, str) else key_of(v),
)
def test_golden(name, case):
    check_golden(getattr(cases.ours, name), case)


@pytest.mark.parametrize(("name", "config"), [(name, config) for name in BOTH for config in configs(name)], ids=str)
def test_every_option_as_diffusers(name, config):
    compare(name, *with_spacing(config))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("largest", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.995])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_thresholding(name, largest, ratio, prediction):
    options = {"dynamic_thresholding_ratio": ratio, "sample_max_value": largest, "prediction_type": prediction}
    compare(name, {"thresholding": True, "solver_order": 3, **options}, 6)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    compare(name, {"solver_order": 3}, 8, dtype=dtype)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 7, 5), (2, 3, 11), (1, 2, 3, 4, 5)])
def test_shapes(name, shape):
    compare(name, {"solver_order": 3}, 6, shape=shape)


@pytest.mark.parametrize("name", BOTH)
def test_channels_last(name):
    compare(name, {}, 6, memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("begin", [3, 7])
def test_from_the_middle(name, begin):
    """As image-to-image begins: the history is empty, so the first step there is of first order."""
    compare(name, {"solver_order": 3}, 9, begin=begin)


def test_learned_variance_is_left_out():
    compare(DPM, {"variance_type": "learned_range"}, 5)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", BOTH)
def test_backends(name, backend):
    if reason := backends.unavailable(backend):
        pytest.skip(reason)
    with backends.use_backend(backend):
        compare(name, {"solver_order": 3}, 6)


@pytest.mark.parametrize("order", [4, 5, 6])
def test_unipc_of_high_order(order):
    compare(UNIPC, {"solver_order": order}, 12, tolerance=1e-5)
