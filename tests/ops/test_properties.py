"""Hypothesis: every op on any shape and with arguments of any strides, by the native kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffkern.backends import unavailable, use_backend
from tests.ops.cases import memory_format, same_bits
from tests.ops.contract import CASES
from tests.ops.contract.case import OpCase, Spec, first_operand
from tests.ops.contract.check import check, run

pytestmark = pytest.mark.skipif(unavailable("native") is not None, reason="no native module")

sizes = st.integers(0, 7) | st.sampled_from([13, 32, 33])


@st.composite
def shapes(draw: st.DrawFn, min_rank: int) -> tuple[int, ...]:
    """Rank 1 to 5, up to a few thousand elements."""
    shape = draw(st.lists(sizes, min_size=min_rank, max_size=5))
    while torch.Size(shape).numel() > 20_000:
        shape[shape.index(max(shape))] = 2
    if min_rank > 1:
        shape[1] = max(shape[1], 1)
    return tuple(shape)


@st.composite
def strided(draw: st.DrawFn, values: Tensor, expanded: bool) -> Tensor:
    """The values in any view: axes permuted in memory, steps, gaps, an offset; NaN between the values.

    If `expanded` is allowed, perhaps one axis repeats its first element with a stride of 0.
    """
    axes = range(values.dim())
    order = draw(st.permutations(axes))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in axes]
    margins = [draw(st.sampled_from([0, 0, 1])) for _ in axes]
    repeated = draw(st.sampled_from([None, None, None, *axes])) if expanded else None
    if repeated is not None:
        values = values.narrow(repeated, 0, min(1, values.shape[repeated]))
    around = torch.full([values.shape[i] * steps[i] + margins[i] for i in order], torch.nan, dtype=values.dtype)
    view = around.permute(*(order.index(i) for i in axes))
    for i in axes:
        view = view.narrow(i, margins[i], values.shape[i] * steps[i])[
            (slice(None),) * i + (slice(None, None, steps[i]),)
        ]
    return view.copy_(values)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_any_shape_and_strides(case: OpCase, data: st.DataObject) -> None:
    shape = data.draw(shapes(case.min_rank))
    dtype = data.draw(st.sampled_from(case.native_dtypes))
    mode = data.draw(st.sampled_from(["grad", "plain"]))
    spec = Spec(shape, dtype)
    inputs = case.make(spec)
    for name, value in inputs.items():
        if name not in case.for_formula and isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            view = data.draw(strided(value, expanded=name not in case.buffers))
            inputs[name] = view.expand(value.shape)
    with use_backend("native"):
        found = check(case, spec, mode, inputs)
        copies = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        contiguous = run(case, copies, spec, mode)
    first = first_operand(inputs)
    if first is not None and memory_format(first) == "contiguous":
        assert all(same_bits(a, b) for a, b in zip(found[0], contiguous[0], strict=True))
