from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffkern import backends
from diffkern.ops import _registry
from tests.ops.cases import BACKENDS

# What takes Triton's interpreter a minute and more, for its sizes or its number of samples (a program takes some 25 ms
# whatever its size). Values, shapes, layouts and dtypes are in the contract, which is interpreted in smaller cells.
SLOWLY_INTERPRETED = {
    "test_batches_may_be_split_anywhere",
    "test_batches_of_256",
    "test_every_combination",
    "test_every_shape",
    "test_float32_against_mpmath",
    "test_float32_gradients_are_those_of_float64",
    "test_large_keys",
    "test_large_samples",
    "test_long_sequences",
    "test_noise_from_a_counter",
    "test_one_value_a_group_has_no_gradient",
    "test_what_is_not_finite_is_where_torchs_softmax_has_it",
    "test_words_are_those_of_the_counter",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        arguments = getattr(item, "callspec", None)
        interpreted = arguments is not None and arguments.params.get("backend") == "triton"
        if interpreted and getattr(item, "originalname", "") in SLOWLY_INTERPRETED:
            item.add_marker(pytest.mark.slow)


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
