"""Memory that is watched: inputs must keep every bit, outputs are NaN until they are written, and neither has a
neighbour that may be touched.

A tensor lies in the middle of a larger buffer filled with 16-bit words that are, as any floating dtype, a NaN (with a
payload that no arithmetic makes) and, as an integer, a negative number. So an element that nobody wrote shows, what is
read beside a tensor spoils the result, and what is written beside it is found in the guard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POISON = -3  # 0xFFFD: the first word of a quiet NaN in each of the formats
GUARD = 256  # bytes on either side
ALIGNMENT = 64  # of torch's own allocations


class Guarded:
    """A context in which torch.empty, torch.empty_like and Tensor.new_empty give guarded, poisoned memory.

    On leaving it without an error, all guards must be intact and the tensors placed by `read_only` as they were.
    """

    def __init__(self) -> None:
        self._guards: list[tuple[Tensor, int, int]] = []
        self._read_only: list[tuple[str, Tensor, int, Tensor, Tensor]] = []

    def read_only(self, name: str, values: Tensor) -> Tensor:
        """A copy of `values` with the same strides, alignment and gaps."""
        placed, buffer = self._place(values)
        self._read_only.append((name, placed, placed._version, buffer, buffer.clone()))
        return placed

    def writable(self, values: Tensor) -> Tensor:
        """A copy likewise, which may be written."""
        return self._place(values)[0]

    def poisoned(self, like: Tensor) -> Tensor:
        """Room for a tensor of like's sizes and strides."""
        return _view(self._buffer(GUARD, _extent(like)), GUARD, like)

    def __enter__(self) -> Guarded:
        self._real = torch.empty, torch.empty_like
        torch.empty, torch.empty_like = map(self._guarding, self._real)
        torch.Tensor.new_empty = self._guarding(torch._C.TensorBase.new_empty)
        return self

    def __exit__(self, kind: object, *raised: object) -> None:
        torch.empty, torch.empty_like = self._real
        del torch.Tensor.new_empty  # the one of torch._C.TensorBase shows again
        if kind is None:
            self.check()

    def check(self) -> None:
        for name, placed, version, buffer, before in self._read_only:
            assert torch.equal(buffer, before), f"{name} or what surrounds it was written"
            assert placed._version == version, f"{name} was written in place"
        for buffer, start, nbytes in self._guards:
            around = torch.cat([buffer[:start], buffer[start + nbytes :]])
            assert bool((around.view(torch.int16) == POISON).all()), f"written beside a tensor of {nbytes} bytes"

    def _guarding(self, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: object, **kwargs: object) -> Tensor:
            like = real(*args, **kwargs)
            return self.poisoned(like) if type(like) is Tensor and like.device.type == "cpu" else like

        return allocate

    def _place(self, values: Tensor) -> tuple[Tensor, Tensor]:
        nbytes, start = _extent(values), GUARD + values.data_ptr() % ALIGNMENT
        buffer = self._buffer(start, nbytes)
        region = torch.tensor([], dtype=torch.uint8)
        region.set_(values.untyped_storage(), values.storage_offset() * values.element_size(), (nbytes,), (1,))
        buffer[start : start + nbytes] = region
        return _view(buffer, start, values), buffer

    def _buffer(self, start: int, nbytes: int) -> Tensor:
        buffer = torch.full(((start + nbytes + GUARD) // 2,), POISON, dtype=torch.int16).view(torch.uint8)
        self._guards.append((buffer, start, nbytes))
        return buffer


def _extent(x: Tensor) -> int:
    """Bytes from x's first element to the end of its last."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    view = torch.tensor([], dtype=like.dtype)
    return view.set_(buffer.untyped_storage(), start // like.element_size(), like.shape, like.stride())


def assert_written(result: Tensor, what: object) -> None:
    """No element still has the bits of poison."""
    words = (
        result.detach()
        .flatten()
        .clone(memory_format=torch.contiguous_format)
        .view(torch.int16)
        .view(-1, result.element_size() // 2)
    )
    assert not bool((words == POISON).all(1).any()), f"{what}: an element was not written"
