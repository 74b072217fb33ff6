"""torch's own normals, drawn on several threads: the numbers of torch.randn_like to the bit, in a fraction of its time.

On a CPU torch draws on one thread, 3 ns a number, which is most of a sampler's step. A float32 normal of a contiguous
tensor takes one 32-bit number of the generator, sixteen at a time (and the last sixteen anew where the size is no
multiple of it). So a tensor can be cut at multiples of sixteen, and each piece drawn by torch itself from a copy of the
generator that was moved to where the piece begins.

On a GPU torch's numbers are a function of counters too, so a kernel can make them where it needs them: `cuda_draws`.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern import backends
from diffkern.ops._layout import is_channels_last
from diffkern.ops._memory import output_like

_CUDA_BLOCK = 256  # threads of a block of torch's kernel
_BLOCK = 16  # torch's; a shorter tensor is drawn in another way
_DRAWING = threading.Lock()  # torch locks a generator for the length of a draw; its lock is not to be had from here
_PIECE_FROM = 2**17  # elements a thread must have for starting it to pay


def _unlock() -> None:
    """In a forked child: whoever held the lock is not there to give it back."""
    global _DRAWING
    _DRAWING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """What torch.randn_like(like) would draw from `generator`: values, dtype, memory format, and its state after."""
    pieces = min(torch.get_num_threads(), like.numel() // _PIECE_FROM)
    if pieces < 2 or not _divisible(like, generator):
        return torch.empty_like(like, requires_grad=False).normal_(generator=generator)
    out = output_like(like)
    with _DRAWING:
        _draw(out.view(-1), generator, pieces)
    return out


def skip_normal_like(like: Tensor, generator: torch.Generator) -> None:
    """Leaves `generator` as `normal_like(like, generator)` would, without the numbers where they can be passed over."""
    out = torch.empty_like(like, requires_grad=False)
    if out.numel() < _BLOCK or not _divisible(out, generator):
        out.normal_(generator=generator)
        return
    with _DRAWING:
        state = generator.get_state()
        # The last sixteen are drawn anew where the size is no multiple of it.
        drawn = out.numel() + (_BLOCK if out.numel() % _BLOCK else 0)
        backends.native_module().advance_torch_generator(state.data_ptr(), drawn)
        generator.set_state(state)


def _divisible(out: Tensor, generator: torch.Generator) -> bool:
    return (
        type(out) is Tensor
        and out.dtype == torch.float32
        and out.device.type == "cpu"
        and generator.device.type == "cpu"
        and out.is_contiguous()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and _pieces_equal_whole()
    )


def _draw(out: Tensor, generator: torch.Generator, pieces: int) -> None:
    """Fills `out`, flat, in `pieces` parts at once; the generator is left where drawing it whole would leave it."""
    size = out.numel() // pieces // _BLOCK * _BLOCK
    bounds = [*range(0, pieces * size, size), out.numel()]
    start = generator.get_state()
    generators = [generator, *(torch.Generator("cpu") for _ in range(pieces - 1))]
    failures: list[BaseException] = []

    def draw(k: int) -> None:
        try:
            if k:
                state = start.clone()
                backends.native_module().advance_torch_generator(state.data_ptr(), bounds[k])
                generators[k].set_state(state)
            with torch.inference_mode(out.is_inference()):  # which each thread has for itself
                out[bounds[k] : bounds[k + 1]].normal_(generator=generators[k])
        except BaseException as error:
            failures.append(error)

    # Threads of our own would compete with the kernels' ones, which wait for work by spinning.
    backends.native_module().run_in_team(draw, pieces)
    if failures:
        generator.set_state(start)
        raise failures[0]
    generator.set_state(generators[-1].get_state())


@functools.cache
def _pieces_equal_whole() -> bool:
    """Whether this torch draws as described above: its generator's layout is its own affair, so it is tried once."""
    if backends.unavailable("native") is not None:
        return False
    whole, halves = torch.Generator("cpu").manual_seed(1), torch.Generator("cpu").manual_seed(1)
    if whole.get_state().numel() != backends.native_module().torch_generator_bytes:
        return False
    expected = torch.empty(2999, dtype=torch.float32, device="cpu").normal_(generator=whole)
    drawn = torch.empty_like(expected)
    try:
        _draw(drawn, halves, 2)
    except ValueError:  # the state does not read as expected
        return False
    return torch.equal(drawn, expected) and torch.equal(whole.get_state(), halves.get_state())


class TorchDraws(NamedTuple):
    """Where a CUDA generator stands, and how torch would draw: with `threads` threads, four normals of each a call.

    Thread k draws from Philox4x32-10 with the key `seed` and the counter (call, k), both of 64 bits, for elements k,
    k + threads, k + 2·threads and k + 3·threads in memory's order; the next four with the next call.
    """

    seed: int
    call: int
    threads: int


def cuda_draws(like: Tensor, generator: torch.Generator) -> TorchDraws | None:
    """The draws of torch.randn_like(like), for a kernel to make; `generator` is left as torch would leave it.

    None, and the generator untouched, where the kernel would not give torch's numbers or a CUDA graph is captured.
    """
    drawn = (
        like.is_cuda
        and generator.device == like.device
        and like.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 0 < like.nbytes < 2**31  # torch draws a larger one in halves, each from an offset of its own
        and (like.is_contiguous() or is_channels_last(like))
        and not torch.cuda.is_current_stream_capturing()
        and _cuda_draws_equal_torchs(like.device)
    )
    return _advanced(like, generator) if drawn else None


def _advanced(like: Tensor, generator: torch.Generator) -> TorchDraws:
    threads = cuda_threads(like.numel(), like.device)
    calls = -(-like.numel() // (4 * threads))
    with _DRAWING:
        state = generator.get_state()
        seed, offset = state.view(torch.int64).tolist()
        state.view(torch.int64)[1] = offset + 4 * calls
        generator.set_state(state)
    return TorchDraws(seed, offset // 4, threads)


def cuda_threads(numel: int, device: torch.device) -> int:
    """The threads that torch draws `numel` normals with: one an element, but no more than the device holds at once."""
    properties = torch.cuda.get_device_properties(device)
    resident = properties.multi_processor_count * (properties.max_threads_per_multi_processor // _CUDA_BLOCK)
    return min(-(-numel // _CUDA_BLOCK), resident) * _CUDA_BLOCK


@functools.cache
def _cuda_draws_equal_torchs(device: torch.device) -> bool:
    """Whether this torch draws as described above: that is its own affair, so it is tried once on each device."""
    from diffkern.ops.philox_normal.triton import torch_normal

    ours, torchs = (torch.Generator(device).manual_seed(7) for _ in range(2))
    for numel in (12, 4 * cuda_threads(2**31, device) + 5):
        expected = torch.empty(numel, dtype=torch.float32, device=device).normal_(generator=torchs)
        drawn = torch_normal(expected, _advanced(expected, ours))
        if not torch.allclose(drawn, expected, rtol=1e-6, atol=2e-6):
            return False
    return torch.equal(ours.get_state(), torchs.get_state())
