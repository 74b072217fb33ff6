"""What every test may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Kernels are interpreted, on a machine with a GPU too: but for tests/gpu, which wants 0. Triton reads this when it is
# imported, which happens with the first kernel.
INTERPRETED = os.environ.setdefault("TRITON_INTERPRET", "1") != "0"

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ("DIFFKERN_BACKEND", "DIFFKERN_CPU", "TRITON_INTERPRET")  # what the tests are run with, not what users have


def without_the_harness() -> dict[str, str]:
    """The environment for a process as users start it."""
    return {k: v for k, v in os.environ.items() if k not in HARNESS}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = (
        "needs an NVIDIA GPU" if not torch.cuda.is_available() else "needs TRITON_INTERPRET=0" if INTERPRETED else ""
    )
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_arrives() -> Iterator[None]:
    """A shell starts background jobs, as CI may be one, with SIGINT ignored; the tests of Ctrl-C send it all the same.

    Child processes inherit an ignored signal too, but not a handler: they begin with the default.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs code in a fresh interpreter and returns what it printed; fails the test if the code fails or hangs."""

    def run(code: str, timeout: float = 120, **environment: str) -> str:
        inherited = without_the_harness()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def two_threads() -> object:
    """Two threads for torch, as many as the smallest machine has, and afterwards what it was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
