"""CUDA tensors without a GPU: fake ones, through torch.library's checks and torch.compile.

What a CPU build of torch cannot do with them is autograd, indexing and copying: these ask for a CUDA device. So the
registered ops are called, with arguments as the public functions make them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from diffkern.ops import group_norm, philox_normal, q_sample
from tests.ops.test_registration import CASES


def fake(value: object) -> object:
    """A tensor like this one on a GPU that does not exist."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def results(found: Tensor | tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    tensors = [found] if isinstance(found, Tensor) else found
    return [(t.shape, t.dtype, t.stride(), t.device.type) for t in tensors]


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    op, arguments = CASES[case]
    with FakeTensorMode():
        given = tuple(fake(value) for value in arguments)
        opcheck(getattr(torch.ops.diffkern, op).default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", CASES)
def test_compile_without_graph_breaks(case):
    """The results are on the GPU, and otherwise what the CPU gives for the same arguments."""
    name, arguments = CASES[case]
    op = getattr(torch.ops.diffkern, name).default
    torch._dynamo.reset()
    expected = op(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
    with FakeTensorMode(), torch.no_grad():
        compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend="aot_eager")
        found = compiled(*(fake(value) for value in arguments))
    assert results(found) == [(*rest, "cuda") for *rest, _ in results(expected)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_public_functions_in_a_row(layout):
    def run(x: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        noised = q_sample(x, t, signal, sigma, seed=1)
        return group_norm(noised + philox_normal(x.shape, 2, device="cuda"), 2, activation="silu")

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 4, 3, 5, device="cuda", memory_format=layout)
        t = torch.empty(2, dtype=torch.int64, device="cuda")
        tables = [torch.empty(10, dtype=torch.float64, device="cuda") for _ in range(2)]
        result = torch.compile(run, fullgraph=True, backend="aot_eager")(x, t, *tables)
    assert results(result) == results(x)
