from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffkern import backends
from diffkern.ops import _registry
from tests.ops.cases import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op inside the test runs on this backend, or raises."""
    reason = backends.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with backends.use_backend(request.param), pytest.MonkeyPatch.context() as patch:
        if request.param == "triton":
            patch.setattr(_registry.Op, "run", _run_but_float64)
        yield request.param


_run = _registry.Op.run


def _run_but_float64(op: _registry.Op, *args: object) -> object:
    """The Triton kernels leave float64, and nothing else, to the reference."""
    if op.unsupported("triton", args) != "float64 is the reference's":
        return _run(op, *args)
    with backends.use_backend("reference"):
        return _run(op, *args)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are so small that a second thread only waits for the first (test_threads.py has its own)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (and for integers the largest value), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
