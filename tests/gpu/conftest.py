"""Nothing here or in the tests beside it needs more than torch, numpy and pytest: a GPU machine may have no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from diffkern import backends


@pytest.fixture(autouse=True, params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What CUDA tensors take: the reference, or what they take by themselves, which are the Triton kernels."""
    if request.param == "reference":
        with backends.use_backend("reference"):
            yield request.param
    else:
        assert backends.unavailable("triton") is None
        yield request.param


@pytest.fixture
def no_synchronisation() -> Callable[[], AbstractContextManager[None]]:
    """A context in which an operation that waits for the GPU is an error."""

    @contextmanager
    def forbidden() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return forbidden
