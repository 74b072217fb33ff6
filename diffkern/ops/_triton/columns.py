"""Sums over the rows of a workspace, for gradients of what all samples or pixels share: one writer, a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffkern.ops._triton import launch

_COLUMNS = 16
_ROWS = 256


@triton.jit
def column_sums_kernel(
    sums,
    out,
    other_sums,
    other_out,
    segments,
    rows,
    columns,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    segment = (program // blocks % segments).to(tl.int64)
    c = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < columns
    source = sums
    if other_sums is not None:
        source = tl.where(program >= segments * blocks, other_sums, sums)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = ((segment * rows + row) * columns)[:, None] + c[None, :]
        total += tl.load(source + at, (row < rows)[:, None] & inside[None, :], other=0.0)
    of_columns = tl.sum(total, 0)
    if other_sums is not None:
        tl.store(other_out + segment * columns + c, of_columns, inside & (program >= segments * blocks))
        inside &= program < segments * blocks
    tl.store(out + segment * columns + c, of_columns, inside)


def column_sums(*pairs: tuple[Tensor, Tensor]) -> None:
    """out (segments, columns) = sums (segments, rows, columns), float32, over the rows, rounded to out's dtype.

    One launch for one or two pairs (sums, out) of the same shape; dense, none is no launch.
    """
    if not pairs:
        return
    (sums, out), (other_sums, other_out) = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
    segments, rows, columns = sums.shape
    rows_of_tile = min(launch.next_power_of_2(rows), _ROWS)
    blocks = launch.cdiv(columns, _COLUMNS)
    launch.launch(
        column_sums_kernel,
        len(pairs) * segments * blocks,
        sums.device,
        num_warps=max(rows_of_tile // 32, 1),
        sums=sums,
        out=out,
        other_sums=other_sums,
        other_out=other_out,
        segments=segments,
        rows=rows,
        columns=columns,
        blocks=blocks,
        ROWS=rows_of_tile,
        COLUMNS=_COLUMNS,
    )
