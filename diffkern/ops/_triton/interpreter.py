"""Triton's interpreter mended: what keeps it from doing as a GPU does. Only imported where kernels are interpreted.

Known of Triton 3.6 (triton.runtime.interpreter): it cuts bfloat16 off where a GPU rounds to the nearest, and loses NaN
on the way (_convert_float); with NumPy 2.4 no scalar can be the bound of a loop (_patch_lang_tensor); and a tile's rows
are added one after another, where a GPU adds them as a tree, which rounds less (ReduceOps.sum).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_patch_tensor = interpreter._patch_lang_tensor
_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
_prepared_call = interpreter.InterpretedFunction.__call__


def mend() -> None:
    interpreter._convert_float = _convert_float
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.ReduceOps.sum = _sum
    # Not mistakes, but half of the time: a call of a function prepares triton.language anew, and types are looked up in
    # a dictionary made for it.
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _numpy_dtype


def _convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """The bits of `values`, floats of Triton's type `source` (bfloat16 as uint16), in the type `target`."""
    values = values.copy()  # contiguous, which a view in another type must be
    if source == tl.bfloat16 and target == tl.float32:
        return values.view(np.uint16).astype(np.uint32) << np.uint32(16)
    if source == tl.float32 and target == tl.bfloat16:
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded[np.isnan(values.view(np.float32))] = 0x7FC00000
        return (rounded >> np.uint32(16)).astype(np.uint16)
    return _convert(values, source, target, rounding_mode)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))


def _sum(reduction: Any, operand: Any) -> Any:
    """The sum along the reduction's axis, in pairs: NumPy does so where the axis is the last in memory."""
    values, axis = operand.handle.data, reduction.axis
    if axis is None:
        total = np.sum(values, keepdims=reduction.keep_dims)
    else:
        total = np.sum(np.ascontiguousarray(np.moveaxis(values, axis, -1)), axis=-1)
        total = np.expand_dims(total, axis) if reduction.keep_dims else total
    return reduction.to_tensor(total, operand.dtype)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function of ours calls another: triton.language is prepared, as the kernel itself was."""
    if function.fn.__module__.startswith("triton."):
        return _prepared_call(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def _numpy_dtype(kind: Any) -> np.dtype:
    """What NumPy calls the elements of a tensor of Triton's type `kind`; an address is a number."""
    return np.dtype(np.uint64) if isinstance(kind.scalar, tl.pointer_type) else _dtype_of_scalar(kind.scalar)
