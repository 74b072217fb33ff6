"""One call held to the contract: watched memory, a second call, and the error beside eager PyTorch's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tests.ops.cases import assert_rounded_once, in_layout, memory_format, randn, same_bits
from tests.ops.contract.case import Inputs, OpCase, Results, Spec, first_operand, in_dtype
from tests.ops.guarded import Guarded, assert_written

MODES = ("grad", "plain", "no_grad", "inference", "autocast")

Found = tuple[Results, Results]  # results, and gradients of all differentiable arguments in mode "grad"


def inside(mode: str) -> AbstractContextManager:
    if mode == "no_grad":
        return torch.no_grad()
    if mode == "inference":
        return torch.inference_mode()
    return torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else nullcontext()


def place(inputs: Inputs, memory: Guarded, leaves: tuple[str, ...]) -> Inputs:
    """The arguments in watched memory, `leaves` among them wanting gradients."""
    placed = {k: memory.read_only(k, v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name in leaves:
        placed[name].requires_grad_()
    return placed


def run(case: OpCase, inputs: Inputs, spec: Spec, mode: str) -> Found:
    """Results and, in mode "grad", the gradients of all leaves; twice, with the same bits."""
    leaves = case.differentiable if mode == "grad" else ()
    with Guarded() as memory:
        placed = place(inputs, memory, leaves)
        both = [once(case, placed, spec, mode, leaves, memory) for _ in range(2)]
    for first, second in zip(both[0][0] + both[0][1], both[1][0] + both[1][1], strict=True):
        assert same_bits(first, second), "two calls differ"
        assert_written(first, case.name)
    return both[0]


def once(case: OpCase, placed: Inputs, spec: Spec, mode: str, leaves: tuple[str, ...], memory: Guarded | None) -> Found:
    with inside(mode):
        results = case.call(placed, memory)
    if not leaves:
        return results, ()
    gradients = differentiate(case, results, placed, spec)
    return tuple(r.detach() for r in results), gradients


def differentiate(case: OpCase, results: Results, inputs: Inputs, spec: Spec) -> Results:
    """The gradients that come from random ones of the results (in the layout of the other arguments)."""
    differentiable = results[: case.differentiable_results]
    dy = [in_layout(randn(*r.shape, seed=20 + i, dtype=spec.dtype), spec.other) for i, r in enumerate(differentiable)]
    dy = [g.to(r.dtype) for g, r in zip(dy, differentiable, strict=True)]
    return torch.autograd.grad(differentiable, [inputs[k] for k in case.differentiable], dy)


def expected(case: OpCase, inputs: Inputs, spec: Spec, dtype: torch.dtype, mode: str) -> Found:
    """Of the formula, computed in `dtype`."""
    leaves = case.differentiable if mode == "grad" else ()
    converted = in_dtype(inputs, dtype)
    for name in leaves:
        converted[name].requires_grad_()
    results = case.formula(converted)
    gradients = differentiate(case, results, converted, spec) if leaves else ()
    return tuple(r.detach() for r in results), gradients


def check(case: OpCase, spec: Spec, mode: str, inputs: Inputs) -> Found:
    """Runs a call and compares; samples with a NaN or Inf whose place is hidden are left to the caller."""
    found = run(case, inputs, spec, mode)
    arithmetic = torch.float64 if spec.dtype == torch.float64 else torch.float32
    plain = spec.dtype if case.in_storage and spec.dtype.itemsize == 2 else torch.float32
    exact, eager = (expected(case, inputs, spec, dtype, mode) for dtype in (torch.float64, plain))
    compared = slice(spec.shape[0] // 2) if case.hides and spec.values in ("nan", "inf", "-inf") else slice(None)
    for number, results in enumerate(zip(found[0], exact[0], eager[0], strict=True)):
        assert_rounded_once(*(r[compared] for r in results), arithmetic, f"result {number}")
        wanted = arithmetic if number < case.reduced_results else spec.dtype
        assert results[0].dtype == wanted or not results[0].is_floating_point()
    for name, gradient, e, other in zip(case.differentiable, found[1], exact[1], eager[1], strict=False):
        assert gradient.dtype == inputs[name].dtype
        if name not in case.cancels(inputs):
            assert_rounded_once(gradient, e, other, arithmetic, f"gradient of {name}")
    first = first_operand(inputs)
    if first is not None:
        written = sum(len(inputs[name]) for name in case.buffers)
        like_first = found[0][case.reduced_results : len(found[0]) - written]
        assert all(memory_format(r) == memory_format(first) for r in like_first)
    return found
