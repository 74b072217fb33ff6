"""Every op inside torch.compile, torch.export and torch.func, in all its forms (contract/).

Traces see the registered op and not its backend, so they run with the backend that is chosen automatically.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.cases import assert_as_good_as_eager, randn, same_bits
from tests.ops.contract import CASES
from tests.ops.contract.case import OpCase, Results, Spec

SHAPE, OTHER_SHAPE = (6, 8, 5, 7), (5, 8, 11, 13)  # sizes that are equal or double by chance would become guards

every_form = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
differentiable = pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def floating(inputs: dict) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}


def function_of(case: OpCase, spec: Spec) -> tuple[Callable[..., Results], list[str], list[Tensor]]:
    """The call as a function of its tensors, their names, and the tensors; what is not a tensor is the spec's."""
    inputs = case.make(spec)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    rest = {k: v for k, v in inputs.items() if k not in names}
    return (
        lambda *tensors: case.call(rest | dict(zip(names, tensors, strict=True)), None),
        names,
        [inputs[k] for k in names],
    )


@every_form
def test_compiled_for_any_shape(case):
    """In one graph, with gradients where there are any; results bit for bit, strides too. Gradients may be summed in
    another order. A second shape compiles nothing.
    """
    fast = torch.compile(lambda inputs: case.call(inputs, None), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in (SHAPE, OTHER_SHAPE):
        inputs = case.make(Spec(shape, layout="channels_last"))
        leaves = [inputs[name].requires_grad_() for name in case.differentiable]
        with torch._dynamo.config.patch(error_on_recompile=shape != SHAPE):
            found = fast(inputs)
        expected = case.call(inputs, None)
        for f, e in zip(found, expected, strict=True):
            assert same_bits(f.detach(), e.detach())
            assert f.stride() == e.stride()
        if leaves:
            count = case.differentiable_results
            dy = [randn(*r.shape, seed=9 + i) for i, r in enumerate(found[:count])]
            for f, e in zip(*(torch.autograd.grad(r[:count], leaves, dy) for r in (found, expected)), strict=True):
                assert_as_good_as_eager(f, e.double(), e, case.name)


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Results]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Results:
        return self.function(*tensors)


@every_form
def test_exported(case):
    """The exported program computes, with other tensors, what the function does."""
    function, _, tensors = function_of(case, Spec(SHAPE))
    exported = torch.export.export(Module(function), tuple(tensors), strict=False).module()
    others = [t + 1 if t.is_floating_point() else t.flip(0) if t.dim() else t for t in tensors]
    for f, e in zip(exported(*others), function(*others), strict=True):
        assert same_bits(f, e)


def loss_of(case: OpCase, spec: Spec, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A number as a function of one argument, with something of every result in it."""
    inputs = case.make(spec)
    results = case.call(inputs, None)[: case.differentiable_results]
    weights = [randn(*r.shape, seed=30 + i) for i, r in enumerate(results)]

    def loss(value: Tensor) -> Tensor:
        results = case.call(inputs | {name: value}, None)
        return sum((r * w).square().sum() for r, w in zip(results, weights, strict=False))

    return loss, inputs[name]


@differentiable
def test_func_grad(backend, case):
    for name in case.differentiable:
        loss, value = loss_of(case, Spec(SHAPE), name)
        leaf = value.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert_as_good_as_eager(torch.func.grad(loss)(value), expected.double(), expected, name)


@differentiable
def test_vmap(backend, case):
    """Over each argument: a loop. And vmap of grad: the gradients one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in case.differentiable:
            inputs = case.make(Spec(SHAPE))
            varied = {k: v for k, v in inputs.items() if k == name or k in case.buffers}
            stacked = {k: torch.stack([v, v * 0.5, v * 0.9]) for k, v in varied.items()}
            call = lambda varied, inputs=inputs: case.call(inputs | varied, None)  # noqa: E731
            one_by_one = [call({k: v[i] for k, v in stacked.items()}) for i in range(3)]
            for f, e in zip(
                torch.func.vmap(call)(stacked), map(torch.stack, zip(*one_by_one, strict=True)), strict=True
            ):
                assert_as_good_as_eager(f, e.double(), e, name)
            if not case.buffers:
                loss, _ = loss_of(case, Spec(SHAPE), name)
                expected = torch.stack([torch.func.grad(loss)(v) for v in stacked[name]])
                assert_as_good_as_eager(
                    torch.func.vmap(torch.func.grad(loss))(stacked[name]), expected.double(), expected, name
                )
