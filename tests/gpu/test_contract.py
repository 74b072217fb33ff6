"""The contract's matrix of dtypes, layouts, shapes and values (tests/ops/test_contract.py) on the GPU's kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import DTYPES, LAYOUTS, assert_rounded_once, same_bits
from tests.ops.contract import CASES
from tests.ops.contract.case import VALUES, Inputs, OpCase, Spec
from tests.ops.contract.check import differentiate, expected
from tests.ops.covering import pairwise

pytestmark = pytest.mark.gpu


def on_the_gpu(value: object) -> object:
    """The tensor there, with the same strides and the same offset into its storage."""
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    copy = whole.cuda()
    return torch.empty(0, dtype=value.dtype, device="cuda").set_(
        copy.untyped_storage(), value.storage_offset(), value.size(), value.stride()
    )


def run(case: OpCase, inputs: Inputs, spec: Spec, mode: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    placed = {name: on_the_gpu(value) for name, value in inputs.items()}
    leaves = case.differentiable if mode == "grad" else ()
    for name in leaves:
        placed[name].requires_grad_()
    with torch.device("cuda"):
        results = case.call(placed, None)
        gradients = differentiate(case, results, placed, spec) if leaves else ()
    return tuple(r.detach().cpu() for r in results), tuple(g.cpu() for g in gradients)


def cells():
    for seed, case in enumerate(CASES):
        dtypes = [dtype for dtype in DTYPES if dtype != torch.float64]
        axes = (case.shapes(), VALUES, LAYOUTS, LAYOUTS, ("grad", "plain"), dtypes)
        for shape, values, layout, other, mode, dtype in pairwise(axes, seed):
            name = f"{case.name}-{'x'.join(map(str, shape))}-{dtype}-{layout}-{other}-{values}-{mode}"
            yield pytest.param(case, Spec(shape, dtype, layout, other, values), mode, id=name)


@pytest.mark.parametrize(("case", "spec", "mode"), list(cells()))
def test_contract(backend, case, spec, mode):
    if backend != "triton":
        pytest.skip("the CPU's tests hold the reference to the contract")
    inputs = case.make(spec)
    found, again = run(case, inputs, spec, mode), run(case, inputs, spec, mode)
    for first, second in zip(found[0] + found[1], again[0] + again[1], strict=True):
        assert same_bits(first, second), "two calls differ"
    exact, eager = (expected(case, inputs, spec, dtype, mode) for dtype in (torch.float64, torch.float32))
    compared = slice(spec.shape[0] // 2) if case.hides and spec.values in ("nan", "inf", "-inf") else slice(None)
    for number, each in enumerate(zip(found[0], exact[0], eager[0], strict=True)):
        assert_rounded_once(*(r[compared] for r in each), torch.float32, f"result {number}")
    for name, gradient, e, other in zip(case.differentiable, found[1], exact[1], eager[1], strict=False):
        if name not in case.cancels(inputs):
            assert_rounded_once(gradient, e, other, torch.float32, f"gradient of {name}")
