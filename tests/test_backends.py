"""Which backend runs, how to choose it, and why another does not."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import diffkern
from diffkern import backends
from diffkern.ops import _registry, group_norm, q_sample, solver_step
from tests.ops import programs

X = torch.linspace(-1, 1, 2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
HAS_NATIVE = backends.unavailable("native") is None
native = pytest.mark.skipif(not HAS_NATIVE, reason="no native module")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The backends whose group_norm runs, in order."""
    seen: list[str] = []
    group_norm(X, 2)
    op = _registry.OPS["group_norm"]
    for name in ("reference", "native") if HAS_NATIVE else ("reference",):
        op.unsupported(name, (X,))
        backend = op._backends[name]

        def spy(*args, name=name, real=backend.function):
            seen.append(name)
            return real(*args)

        monkeypatch.setitem(op._backends, name, backend._replace(function=spy))
    # Its short road is the native backend's own, and is tested in ops/test_group_norm_eager.py.
    monkeypatch.setattr(backends, "eager_native", lambda: None)
    return seen


@native
def test_the_native_backend_is_preferred_on_a_cpu(calls):
    group_norm(X, 2)
    group_norm(X.double(), 2)
    assert calls == ["native", "reference"]


@native
def test_use_backend_nests_and_ends(calls):
    with backends.use_backend("reference"):
        group_norm(X, 2)
        with backends.use_backend("native"):
            group_norm(X, 2)
        group_norm(X, 2)
    group_norm(X, 2)
    with pytest.raises(KeyError), backends.use_backend("reference"):
        raise KeyError
    group_norm(X, 2)
    assert calls == ["reference", "native", "reference", "native", "native"]


def test_use_backend_holds_in_all_threads():
    with backends.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.forced_backend).result() == "reference"
    assert backends.forced_backend() is None


def test_the_choice_also_reaches_the_backward_pass(calls):
    with backends.use_backend("reference"):
        x = X.clone().requires_grad_()
        group_norm(x, 2).sum().backward()
    assert calls == ["reference"]


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton, sdpa, got 'cuda'"):
        backends.use_backend("cuda").__enter__()
    assert backends.forced_backend() is None


@native
def test_a_backend_asked_for_by_name_raises_where_it_cannot_run():
    with backends.use_backend("native"):
        with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot run group_norm: float64"):
            group_norm(X.double(), 2)
        with pytest.raises(RuntimeError, match="CPU tensors, this one is on meta"):
            group_norm(X.to("meta"), 2)
        q_sample(X.double(), torch.tensor([0, 0]), torch.ones(1), torch.ones(1), seed=1)


def test_triton_asked_for_raises_where_it_cannot_run(run_python):
    code = (
        "import torch\nfrom diffkern.ops import philox_normal\n"
        "try:\n philox_normal((2, 3), 1, device='cpu')\nexcept RuntimeError as error: print(error)"
    )
    error = run_python(code, DIFFKERN_BACKEND="triton")
    assert error.startswith("the backend 'triton' was asked for and cannot run philox_normal: ")
    assert re.search("no CUDA device|triton does not import|for CUDA tensors, this one is on cpu", error)


@pytest.mark.skipif(backends.unavailable("triton") is not None, reason="no Triton")
def test_interpreted_kernels_run_only_where_they_are_asked_for(run_python):
    code = (
        "import torch\nfrom diffkern import backends\nfrom diffkern.ops import channel_rms_norm\n"
        "x = torch.ones(1, 2, 3)\n"
        "print(backends.explain('channel_rms_norm', x)); print(backends.explain('channel_rms_norm', x.double()))\n"
        "with backends.use_backend('triton'): print(backends.explain('channel_rms_norm', x))"
    )
    by_itself, double, asked = run_python(code, TRITON_INTERPRET="1").splitlines()
    assert "channel_rms_norm: triton" not in by_itself + double
    assert asked == "channel_rms_norm: triton (asked for)"


def test_explain_says_which_and_why():
    if HAS_NATIVE:
        assert backends.explain("group_norm", X, 2) == "group_norm: native"
        assert backends.explain("group_norm", X.double(), 2).startswith("group_norm: reference; not native: float64")
        assert "on meta" in backends.explain("group_norm", X.to("meta"), 2)
        assert backends.explain("solver_step", X, X, programs.PLAIN, 0, seed=1) == "solver_step: native"
    with backends.use_backend("reference"):
        assert backends.explain("group_norm", X, 2) == "group_norm: reference (asked for)"
    with backends.use_backend("triton"):
        reason = backends.unavailable("triton")
        cannot = f", which cannot run: {reason}" if reason else ""
        assert backends.explain("q_sample") == f"q_sample: triton (asked for){cannot}"
    for name in _registry.OPS:
        assert backends.explain(name).startswith(f"{name}: ")
    with pytest.raises(ValueError, match=r"op must be one of .*group_norm.*got 'softmax'"):
        backends.explain("softmax")


def test_explain_does_not_run_or_change_anything():
    """Not the out buffer, not the random numbers to come; a bad argument is the error that the op itself gives."""
    out, generator = torch.full_like(X, 7.0), torch.Generator().manual_seed(3)
    state = generator.get_state()
    backends.explain("solver_step", X, X, programs.PLAIN, 0, generator=generator, out=out)
    assert bool((out == 7.0).all())
    assert torch.equal(generator.get_state(), state)
    with pytest.raises(ValueError, match="num_groups"):
        backends.explain("group_norm", X, 3)
    assert bool(group_norm(X, 2).isfinite().all())


def test_the_environment_variable(run_python):
    code = "from diffkern import backends; print(backends.forced_backend(), backends.explain('q_sample'))"
    assert run_python(code, DIFFKERN_BACKEND="reference") == "reference q_sample: reference (asked for)"
    code = "try:\n import diffkern.backends\nexcept ValueError as error: print(error)"
    assert run_python(code, DIFFKERN_BACKEND="fast") == (
        "DIFFKERN_BACKEND must be one of reference, native, triton, sdpa, got 'fast'"
    )


WITHOUT = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "diffkern._cpu":
            raise ImportError("hidden by the test")

sys.meta_path.insert(0, Hidden())
import torch
from diffkern import backends
from diffkern.ops import group_norm
"""


def test_without_the_native_module_the_reference_runs_and_says_why(run_python):
    code = WITHOUT + "print(group_norm(torch.ones(1, 4, 2), 2).sum().item()); print(backends.explain('group_norm'))"
    number, explanation = run_python(code).splitlines()
    assert number == "0.0"
    assert explanation.startswith("group_norm: reference; not native: ")


def test_without_the_native_module_asking_for_it_raises(run_python):
    code = WITHOUT + (
        "try:\n group_norm(torch.ones(1, 4, 2), 2)\nexcept RuntimeError as error: print(error)\n"
        "print(backends.unavailable('native'))"
    )
    error, reason = run_python(code, DIFFKERN_BACKEND="native").splitlines()
    assert error == f"the backend 'native' was asked for and cannot run group_norm: {reason}"


def test_the_recorded_reason_of_a_failed_build_is_shown(monkeypatch, tmp_path):
    """setup.py leaves it beside the package; without it the import's own error is shown."""
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    monkeypatch.setitem(__import__("sys").modules, "diffkern._cpu", None)
    monkeypatch.delattr(diffkern, "_cpu", raising=False)
    load = backends._load_native.__wrapped__
    assert "does not import" in load()[1]
    (tmp_path / "_build_failure.txt").write_text("the native build failed: no compiler\n")
    assert load() == (None, "the native build failed: no compiler")


def test_a_step_with_a_generator_draws_nothing_when_explained_under_grad():
    x = X.clone().requires_grad_()
    assert backends.explain("group_norm", x, 2) == backends.explain("group_norm", X, 2)
    assert solver_step(x, x, programs.PLAIN, 0, seed=1).requires_grad
