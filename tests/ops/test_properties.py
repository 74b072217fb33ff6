"""Hypothesis: any shape and any strides, the native kernels against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkern.backends import unavailable, use_backend
from diffkern.ops import diffusion_loss_and_grad, group_norm, philox_normal, q_sample
from tests.ops import oracles
from tests.ops.cases import STORAGE, assert_as_good_as_eager, memory_format, randn, same_bits
from tests.ops.test_diffusion_loss import TABLES, TARGETS, loss_and_grad
from tests.ops.test_q_sample import SIGMA, SIGNAL

pytestmark = pytest.mark.skipif(unavailable("native") is not None, reason="no native module")

few = settings(deadline=None, derandomize=True, max_examples=150)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, seeds: int = 0) -> torch.Tensor:
    """Any view: axes permuted in memory, steps, gaps, an offset, strides of 0; NaN between the values."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    margins = [draw(st.sampled_from([0, 0, 1])) for _ in shape]
    expand = draw(st.sampled_from([None, None, None, *range(len(shape))]))
    sizes = [1 if i == expand else size for i, size in enumerate(shape)]
    around = torch.full([sizes[i] * steps[i] + margins[i] for i in order], torch.nan, dtype=dtype)
    view = around.permute(*(order.index(i) for i in range(len(shape))))
    for i, size in enumerate(sizes):
        view = view.narrow(i, margins[i], size * steps[i])[(slice(None),) * i + (slice(None, None, steps[i]),)]
    view.copy_(randn(*sizes, seed=draw(st.integers(seeds, seeds + 3))).to(dtype) * draw(st.sampled_from([1.0, 30.0])))
    return view.expand(shape)


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


@few
@given(data=st.data())
def test_group_norm(data):
    groups, per_group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    shape = (data.draw(st.integers(0, 4)), groups * per_group, *data.draw(shapes))
    dtype = data.draw(st.sampled_from(STORAGE))
    x = data.draw(strided(shape, dtype))
    weight, bias = (data.draw(st.none() | strided((shape[1],), dtype)) for _ in range(2))
    scale, shift = (data.draw(st.none() | strided(shape[:2], dtype)) for _ in range(2))
    silu = data.draw(st.booleans())
    leaves = [None if p is None else p.detach().requires_grad_() for p in (x, weight, bias, scale, shift)]
    x, weight, bias, scale, shift = leaves
    wanted = [p for p in leaves if p is not None]
    dy = data.draw(strided(shape, dtype, seeds=10))  # never x itself, which dx would cancel to nothing
    with use_backend("native"):
        y = group_norm(x, groups, weight, bias, scale=scale, shift=shift, activation="silu" if silu else None)
        found = torch.autograd.grad(y, wanted, dy)
    exact = oracles.group_norm(x, groups, weight, bias, 1e-5, scale, shift, silu)
    exact_gradients = torch.autograd.grad(exact, wanted, dy.double())
    with use_backend("reference"):
        other = group_norm(x, groups, weight, bias, scale=scale, shift=shift, activation="silu" if silu else None)
        others = torch.autograd.grad(other, wanted, dy)
    assert memory_format(y) == memory_format(x)
    assert_as_good_as_eager(y, exact, other, shape)
    for f, e, o in zip(found, exact_gradients, others, strict=True):
        assert_as_good_as_eager(f, e, o, shape)


@few
@given(data=st.data())
def test_q_sample(data):
    shape = (data.draw(st.integers(0, 4)), *data.draw(shapes))
    dtype = data.draw(st.sampled_from((*STORAGE, torch.float64)))
    x0 = data.draw(strided(shape, dtype))
    t = data.draw(
        st.lists(st.integers(0, 999), min_size=shape[0], max_size=shape[0]).map(lambda v: torch.tensor(v).long())
    )
    given_noise = data.draw(st.booleans())
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    with use_backend("native"):
        if given_noise:
            noise = data.draw(strided(shape, dtype))
            x_t = q_sample(x0, t, SIGNAL, SIGMA, noise=noise)
        else:
            counter = {
                "draw": data.draw(st.integers(0, 2**40)),
                "samples": data.draw(st.integers(0, 2**50)),
                "stream": 1,
            }
            noise = philox_normal(shape, 9, **counter, dtype=computed)
            x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, seed=9, **counter, return_noise=True)
            assert same_bits(eps, noise.to(dtype))
    exact = oracles.q_sample(x0, t, SIGNAL, SIGMA, noise, torch.float64)
    assert memory_format(x_t) == memory_format(x0)
    assert_as_good_as_eager(x_t, exact, oracles.q_sample(x0, t, SIGNAL, SIGMA, noise, dtype), shape)


@few
@given(data=st.data())
def test_diffusion_loss(data):
    shape = (data.draw(st.integers(0, 4)), *data.draw(shapes))
    dtype = data.draw(st.sampled_from(STORAGE))
    # Each with values of its own, so that their difference does not vanish.
    output, x0, noise = (data.draw(strided(shape, dtype, seeds=seeds)) for seeds in (0, 10, 20))
    t = torch.tensor([data.draw(st.integers(0, 999)) for _ in range(shape[0])], dtype=torch.int64)
    weight = data.draw(st.none() | strided(shape[:1], torch.float32, seeds=30))
    target = data.draw(st.sampled_from(TARGETS))
    source = {"noise": noise}
    if data.draw(st.booleans()):
        source = {"seed": 9, "draw": data.draw(st.integers(0, 2**40)), "samples": data.draw(st.integers(0, 2**50))}
        noise = philox_normal(shape, **source, stream=3)
    with use_backend("native"):
        found = diffusion_loss_and_grad(output, x0, t, TABLES, scale=3.0, target=target, weight=weight, **source)
    oracle = (x0, t, *TABLES, noise, target, weight)
    exact = loss_and_grad(output.double(), *oracle, scale=3.0, dtype=torch.float64)
    eager = loss_and_grad(output, *oracle, scale=3.0, dtype=torch.float32)
    assert memory_format(found[1]) == memory_format(output)
    for f, e, other in zip(found, exact, eager, strict=True):
        assert_as_good_as_eager(f, e, other, (shape, target))
