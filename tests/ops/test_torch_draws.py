"""torch's draws on several threads are torch's draws: values, order, and what the generator draws next."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from diffkern.backends import native_module, unavailable
from diffkern.ops import _torch_draws, q_sample
from diffkern.ops._torch_draws import normal_like, skip_normal_like
from diffkern.process import GaussianProcess, linear_betas

pytestmark = pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
FROM = _torch_draws._PIECE_FROM


@pytest.fixture(params=[2, 3, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def drawn_in_pieces(monkeypatch):
    """How often a tensor was really cut: without it these tests would compare torch with itself."""
    calls = []
    draw = _torch_draws._draw
    monkeypatch.setattr(_torch_draws, "_draw", lambda *args: (calls.append(args[2]), draw(*args))[1])
    return calls


def generators(burn: int) -> tuple[torch.Generator, torch.Generator]:
    pair = torch.Generator().manual_seed(burn), torch.Generator().manual_seed(burn)
    for generator in pair:
        torch.empty(burn).uniform_(generator=generator)  # a 32-bit number each
    return pair


def assert_same(like: torch.Tensor, burn: int = 0) -> None:
    theirs, ours = generators(burn)
    expected = torch.empty_like(like).normal_(generator=theirs)
    drawn = normal_like(like, ours)
    assert torch.equal(drawn, expected)
    assert drawn.stride() == expected.stride()
    assert torch.equal(theirs.get_state(), ours.get_state())
    assert torch.equal(torch.randn(20, generator=theirs), torch.randn(20, generator=ours))


def test_this_torch_is_taken_apart():
    assert _torch_draws._pieces_equal_whole()


@pytest.mark.parametrize("extra", [0, 1, 7, 15, 16, 17, 1000])
@pytest.mark.parametrize("burn", [0, 1, 623, 624, 625, 5000])
def test_equal_to_torch(threads, extra, burn, drawn_in_pieces):
    assert_same(torch.empty(threads * FROM + extra), burn)
    assert drawn_in_pieces == [threads]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 2 * FROM - 1])
def test_small_tensors_are_not_cut(size, drawn_in_pieces):
    assert_same(torch.empty(size))
    assert drawn_in_pieces == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(threads, dtype):
    assert_same(torch.empty(threads * FROM, dtype=dtype))


def test_channels_last(threads):
    assert_same(torch.empty(16, 3, 128, 128).contiguous(memory_format=torch.channels_last))


def test_in_inference_mode(threads, drawn_in_pieces):
    with torch.inference_mode():
        assert_same(torch.empty(threads * FROM))
    assert drawn_in_pieces == [threads]


def test_default_generator(threads):
    torch.manual_seed(5)
    expected = torch.randn(threads * FROM)
    torch.manual_seed(5)
    assert torch.equal(normal_like(expected, torch.default_generator), expected)


def test_op_draws_what_randn_like_draws(threads, drawn_in_pieces):
    tables = GaussianProcess(linear_betas(1000)).tables("cpu")[:2]
    x0 = torch.zeros(threads, FROM)
    theirs, ours = generators(0)
    expected = torch.empty_like(x0).normal_(generator=theirs)
    _, eps = q_sample(x0, torch.zeros(threads, dtype=torch.int64), *tables, generator=ours, return_noise=True)
    assert torch.equal(eps, expected)
    assert drawn_in_pieces == [threads]


@pytest.mark.parametrize("count", [0, 1, 622, 623, 624, 625, 1247, 1248, 1249, 100_000])
@pytest.mark.parametrize("burn", [0, 1, 623, 624])
def test_advance(count, burn):
    walked, jumped = generators(burn)
    torch.empty(count).uniform_(generator=walked)
    state = jumped.get_state()
    native_module().advance_torch_generator(state.data_ptr(), count)
    jumped.set_state(state)
    assert torch.equal(torch.randn(2000, generator=walked), torch.randn(2000, generator=jumped))


def test_foreign_state_is_refused():
    state = torch.full((native_module().torch_generator_bytes,), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="not that of a CPU"):
        native_module().advance_torch_generator(state.data_ptr(), 1)
    assert (state == 255).all()


def test_failure_leaves_the_generator(monkeypatch, threads):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()

    def fail(*args):
        raise RuntimeError("no")

    assert _torch_draws._pieces_equal_whole()
    monkeypatch.setattr(native_module(), "advance_torch_generator", fail)
    with pytest.raises(RuntimeError, match="no"):
        normal_like(torch.empty(threads * FROM), generator)
    assert torch.equal(generator.get_state(), before)


def test_threads_that_share_a_generator_draw_different_numbers(threads):
    generator, like, seen = torch.Generator().manual_seed(0), torch.empty(threads * FROM), []

    def draw():
        seen.extend(normal_like(like, generator)[0].item() for _ in range(10))

    workers = [threading.Thread(target=draw) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    alone = torch.Generator().manual_seed(0)
    assert sorted(seen) == sorted(normal_like(like, alone)[0].item() for _ in range(30))


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_defaults_of_torch_change_nothing(default):
    _torch_draws._pieces_equal_whole.cache_clear()
    try:
        if default == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        assert _torch_draws._pieces_equal_whole()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        _torch_draws._pieces_equal_whole.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_draws(run_python):
    """The child has the lock as it was, and nobody who would release it. (torch's own parallel calls hang there.)"""
    code = """
import os, signal
import torch
from diffkern.ops import _torch_draws
torch.set_num_threads(2)
like = torch.empty(2 * _torch_draws._PIECE_FROM)
def drawn():
    return _torch_draws.normal_like(like, torch.Generator().manual_seed(0)).numpy().tobytes()
expected = torch.empty_like(like).normal_(generator=torch.Generator().manual_seed(0)).numpy().tobytes()
assert drawn() == expected
with _torch_draws._DRAWING:  # as another thread would hold it
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if drawn() == expected else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(code) == "0"


@pytest.mark.parametrize("size", [1, 15, 16, 17, 640, 1000, 2**18 + 3])
@pytest.mark.parametrize("burn", [0, 1, 623, 624, 625, 5000])
def test_a_draw_passed_over_leaves_the_generator_as_a_draw_does(size, burn):
    theirs, ours = generators(burn)
    for generator in (theirs, ours):
        torch.randn(3, generator=generator)  # leaves a normal over for the next draw of fewer than sixteen
    like = torch.empty(size)
    torch.empty_like(like).normal_(generator=theirs)
    skip_normal_like(like, ours)
    assert torch.equal(theirs.get_state(), ours.get_state())
    assert torch.equal(torch.randn(20, generator=theirs), torch.randn(20, generator=ours))


@pytest.mark.parametrize("like", [torch.empty(4, 16, dtype=torch.float16), torch.empty(2, 4, 5, 5).permute(0, 2, 3, 1)])
def test_what_cannot_be_passed_over_is_drawn(like):
    theirs, ours = generators(5)
    torch.empty_like(like).normal_(generator=theirs)
    skip_normal_like(like, ours)
    assert torch.equal(theirs.get_state(), ours.get_state())
