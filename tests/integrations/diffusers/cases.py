"""What every scheduler is held against: diffusers' stored trajectories, and diffusers itself as a float64 oracle.

A test of one class is then a list of cases:

    @pytest.mark.parametrize("case", golden_cases("DDIMScheduler"), ids=key_of)
    def test_golden(case):
        check_golden(DDIMScheduler, case)

    def test_peer(config):
        compare_steps("DDIMScheduler", config, step_kwargs={"eta": 0.5}, tolerance=2e-6)
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden_data import error, load

diffusers = pytest.importorskip("diffusers")
ours = importlib.import_module("diffkern.integrations.diffusers")

GOLDEN = load("diffusers_schedulers")


def network(x: Tensor, t: Any, *, a: float = 1.3, b: float = 0.01, w: float = 0.8, var: str | None = None) -> Tensor:
    """tests/stub_networks.py's closed form for tensors of any rank from 2; its arithmetic is in x's dtype.

    var: None, "range" (further C channels within ±1.2), or "log" (a log-variance about −3).
    """
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    c = torch.arange(x.shape[1], dtype=x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))
    mean = w * torch.tanh(x) + (1 - w) * torch.sin(a * x + b * t + 0.1 * c)
    if var is None:
        return mean
    wave = torch.sin(0.7 * x - b * t + 0.3)
    return torch.cat([mean, {"range": 1.2 * wave, "log": -3 + 0.5 * wave}[var]], dim=1)


# Stored trajectories.


def golden_cases(name: str) -> list[dict[str, Any]]:
    """The stored cases of the class called `name`."""
    return [case for case in GOLDEN.meta["cases"] if case["cls"] == name and f"{case['key']}/x_init" in GOLDEN]


def key_of(case: dict[str, Any]) -> str:
    return case["key"]


def check_golden(cls: type, case: dict[str, Any]) -> None:
    """The whole trajectory, from x_init on with our own samples, against each step that is stored.

    x within 2e-6. x0 within 1.5e-5: a step divides by a small √ᾱ what x differs by.
    """
    key = case["key"]
    scheduler = cls(**case["config"])
    steps = case["set_timesteps"]
    scheduler.set_timesteps(**steps) if isinstance(steps, dict) else scheduler.set_timesteps(steps)
    # Fractional timesteps are looked up in a table of levels, which diffusers has in float32.
    off = 5e-3 if scheduler.timesteps.is_floating_point() else 0
    np.testing.assert_allclose(scheduler.timesteps.numpy(), GOLDEN[f"{key}/timesteps"], rtol=0, atol=off)
    x = torch.tensor(GOLDEN[f"{key}/x_init"])
    noise = iter([torch.tensor(draw) for draw in GOLDEN[f"{key}/noise"]] if case["n_draws"] else [])
    scheduler._noise_source = lambda *_: {"noise": next(noise)}
    kept = GOLDEN[f"{key}/kept"].tolist()
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(x, t), t, var=case["stub_var"])
            step = scheduler.step(output, t, x, **case["step_kwargs"])
            x = step.prev_sample
            if i in kept:
                stored = kept.index(i)
                assert error(x.numpy(), GOLDEN[f"{key}/x"][stored]) < 2e-6, f"step {i}"
                x0 = step.get("pred_original_sample")
                if x0 is not None and f"{key}/pred_original_sample" in GOLDEN:
                    expected = GOLDEN[f"{key}/pred_original_sample"][stored]
                    assert error(x0.numpy(), expected) < 1.5e-5, f"step {i}"
    assert next(noise, None) is None, "fewer draws than diffusers made"


# diffusers itself.


def pair(name: str, config: dict[str, Any] | None = None, **extra: Any) -> tuple[Any, Any]:
    """(diffusers' scheduler, ours) of one config; both reckon with their tables, which are the same, in float64.

    `extra` (`noise`) goes to ours alone.
    """
    theirs, mine = getattr(diffusers, name)(**(config or {})), getattr(ours, name)(**(config or {}), **extra)
    for table in ("betas", "alphas", "alphas_cumprod"):
        torch.testing.assert_close(getattr(mine, table), getattr(theirs, table), rtol=0, atol=0, equal_nan=True)
    first, single = theirs.alphas_cumprod[0], torch.tensor(1.0, dtype=torch.float64)
    theirs.alphas_cumprod, mine.alphas_cumprod = (torch.tensor(mine._abar) for _ in range(2))
    for end in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(theirs, end):
            setattr(theirs, end, theirs.alphas_cumprod[0] if getattr(theirs, end) == first else single)
    if hasattr(theirs, "alpha_t"):
        theirs.alpha_t, theirs.sigma_t = theirs.alphas_cumprod.sqrt(), (1 - theirs.alphas_cumprod).sqrt()
        theirs.lambda_t = theirs.alpha_t.log() - theirs.sigma_t.log()
    return theirs, mine


@contextlib.contextmanager
def oracle_draws(scheduler: Any, dtype: torch.dtype) -> Iterator[None]:
    """diffusers' draws while it runs in float64: those that it makes in `dtype`."""
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    draw = module.randn_tensor
    with mock.patch.object(module, "randn_tensor", lambda *a, **k: draw(*a, **{**k, "dtype": dtype}).double()):
        yield


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """`.to(torch.float32)`, with which some schedulers of diffusers upcast their samples, gives float64."""
    to = torch.Tensor.to

    def upcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *(torch.float64 if arg is torch.float32 else arg for arg in args), **kwargs)

    with mock.patch.object(torch.Tensor, "to", upcast):
        yield


def compare_steps(
    name: str,
    config: dict[str, Any] | None = None,
    *,
    tolerance: float,
    steps: int | dict[str, Any] = 10,
    step_kwargs: dict[str, Any] | None = None,
    shape: tuple[int, ...] = (2, 3, 8, 8),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format | None = None,
    var: str | None = None,
    seeds: int | list[int] | None = 5,
    begin: int = 0,
    sigma_tolerance: float = 1e-5,
    x0_from_state: bool = False,
) -> None:
    """Every step of ours against diffusers' own one, made in float64 of the same sample and network output.

    Both are given the sample that diffusers goes on with, rounded to `dtype`, so that an error is one step's. `steps`
    goes to set_timesteps; a run that starts at `begin` calls set_begin_index where there is one. `seeds`: of the
    generator, or of a list of them, or None for schedulers that take none; both sides' generators end in one state.
    `tolerance` is relative to the largest value; half a unit of `dtype`'s last place is allowed beside it.
    `x0_from_state`: x0 is a difference of numbers as large as the state, whose float32 decides how exact it can be.
    """
    theirs, mine = pair(name, config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(**steps) if isinstance(steps, dict) else scheduler.set_timesteps(steps)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
    assert mine.timesteps.dtype == theirs.timesteps.dtype
    # Fractional ones may come from levels that diffusers interpolates in float32.
    fractional = mine.timesteps.is_floating_point()
    torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=1e-5 * fractional, atol=1e-6 * fractional)
    if hasattr(theirs, "sigmas"):
        assert mine.sigmas.dtype == theirs.sigmas.dtype
        assert mine.sigmas.device == theirs.sigmas.device
        np.testing.assert_allclose(mine.sigmas, theirs.sigmas, rtol=sigma_tolerance)
        np.testing.assert_allclose(float(mine.init_noise_sigma), float(theirs.init_noise_sigma), rtol=sigma_tolerance)
        theirs.sigmas = torch.tensor(mine._levels)
    allowed = tolerance + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)

    def generators() -> dict[str, Any]:
        if seeds is None:
            return {}
        made = [torch.Generator().manual_seed(s) for s in (seeds if isinstance(seeds, list) else [seeds])]
        return {"generator": made if isinstance(seeds, list) else made[0]}

    their_source, my_source = generators(), generators()
    start = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * float(mine.init_noise_sigma)
    x = start.to(dtype)
    with torch.no_grad(), oracle_draws(theirs, dtype):
        for i, t in enumerate(mine.timesteps[begin:], begin):
            x = x if memory_format is None else x.to(memory_format=memory_format)
            their_t = theirs.timesteps[i]
            their_input, my_input = theirs.scale_model_input(x.double(), their_t), mine.scale_model_input(x, t)
            check_close(my_input, their_input, x, allowed, f"step {i}, scaled input")
            output = network(their_input, t, var=var).to(dtype)
            output = output if memory_format is None else output.to(memory_format=memory_format)
            before = output.clone(), x.clone()
            with in_float64():
                expected = theirs.step(output.double(), their_t, x.double(), **(step_kwargs or {}), **their_source)
            actual = mine.step(output, t, x, **(step_kwargs or {}), **my_source)
            assert torch.equal(output, before[0]), "step changed model_output"
            assert torch.equal(x, before[1]), "step changed sample"
            check_close(actual.prev_sample, expected.prev_sample, x, allowed, f"step {i}")
            if expected.get("pred_original_sample") is not None:
                x0 = expected.pred_original_sample
                amplified = max(1.0, float(x.abs().max() / x0.abs().max())) if x0_from_state else 1.0
                check_close(actual.pred_original_sample, x0, x, allowed * amplified, f"step {i}, x0")
            x = expected.prev_sample.to(dtype)
    assert states(my_source) == states(their_source), "the generators are left in different states"


def check_close(actual: Tensor, expected: Tensor, like: Tensor, tolerance: float, what: str) -> None:
    """Values to `tolerance` of the largest; dtype, shape and memory format of `like`."""
    assert actual.dtype == like.dtype, what
    assert actual.shape == like.shape, what
    assert actual.stride() == like.stride(), what
    if expected.any():
        assert error(actual.double().numpy(), expected.double().numpy()) < tolerance, what
    else:
        assert not actual.any(), what


def states(source: dict[str, Any]) -> list[list[int]]:
    """The state of each generator."""
    given = source.get("generator", [])
    return [one.get_state().tolist() for one in (given if isinstance(given, list) else [given])]


def pairwise(options: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Configs in which every two options' every two values meet, few in number (greedy)."""
    names = list(options)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    generator = np.random.default_rng(seed)
    configs = []
    while missing:
        # Of fifty random configs that hold one of the missing pairs, the one that holds the most of them.
        wanted = dict(sorted(missing)[0])
        tries = [{n: int(generator.integers(len(options[n]))) for n in names} | wanted for _ in range(50)]
        best = max(tries, key=lambda chosen: len(missing & set(itertools.combinations(chosen.items(), 2))))
        missing -= set(itertools.combinations(best.items(), 2))
        configs.append({name: options[name][i] for name, i in best.items()})
    return configs


class HostRead(AssertionError):
    """A tensor's value was asked for on the host."""


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise HostRead("a step read a tensor's value on the host")
        return func(*args, **(kwargs or {}))


def no_host_reads() -> _NoHostReads:
    """Context in which `.item()`, `bool(tensor)`, `float(tensor)` and the like raise HostRead."""
    return _NoHostReads()
