"""Memory of outputs: a large one on a CPU takes the place of an earlier one that nobody holds any more.

malloc gives a few MiB back to the system as soon as they are free, and touching them again costs a fault for every
page: more than a fused step takes. The native module keeps up to 64 MiB of such memory (csrc/cpu/recycled.h).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from diffkern import backends
from diffkern.ops._layout import empty_like_layout

LARGE = 2**18  # bytes
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def output_like(x: Tensor) -> Tensor:
    """An empty tensor in x's memory format, or contiguous if x has neither; of values that are nothing.

    One in recycled memory, 256 KiB to 32 MiB on a CPU, is like any other, but that its storage cannot be resized.
    """
    if x.nbytes < LARGE or not _recyclable(x):
        return empty_like_layout(x)
    like = empty_like_layout(x, device="meta")
    return from_dlpack(backends.native_module().recycled(_DTYPES[x.dtype], like.shape, like.stride()))


def _recyclable(x: Tensor) -> bool:
    return bool(
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and not _traced(x)
        and backends.unavailable("native") is None
        and backends.native_module().recyclable(x.nbytes)
    )


def _traced(x: Tensor) -> bool:
    """Whether somebody else decides what an empty tensor is: tracing, a mode or transform, a kind of tensor."""
    return bool(
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )
