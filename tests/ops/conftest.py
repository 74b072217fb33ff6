from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffkern import backends
from tests.ops.cases import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op inside the test runs on this backend, or raises."""
    reason = backends.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with backends.use_backend(request.param):
        yield request.param


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
