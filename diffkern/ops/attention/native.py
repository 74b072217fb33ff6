"""Attention through csrc/cpu/attention.cpp and attention_backward.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.backends import native_module
from diffkern.ops._native import DTYPE_CODES, about_to_write, cpu_only
from diffkern.ops.attention.views import by_head, empty_lse, out_like, packed, separate

PARALLEL_FROM = 1 << 20  # multiplications; below, waking a second thread costs more than it saves


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = about_to_write(out_like(q, q.shape[2 if channels_last else 1], channels_last))
    views = separate(q, k, v, num_heads, channels_last)
    return out, _attend(*views, scale, by_head(out, num_heads, channels_last), with_lse)


def attention_qkv(
    qkv: Tensor, num_heads: int, order: str, scale: float, channels_last: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    out = about_to_write(out_like(qkv, qkv.shape[2 if channels_last else 1] // 3, channels_last))
    views = packed(qkv, num_heads, order, channels_last)
    return out, _attend(*views, scale, by_head(out, num_heads, channels_last), with_lse)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = q.shape[2 if channels_last else 1]
    dq, dk, dv = (about_to_write(out_like(x, channels, channels_last)) for x in (q, k, v))
    views, grads = (separate(*three, num_heads, channels_last) for three in ((q, k, v), (dq, dk, dv)))
    _differentiate(
        by_head(dout, num_heads, channels_last), *views, by_head(out, num_heads, channels_last), lse, scale, *grads
    )
    return dq, dk, dv


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, order: str, scale: float, channels_last: bool
) -> Tensor:
    dqkv = about_to_write(out_like(qkv, qkv.shape[2 if channels_last else 1], channels_last))
    views, grads = (packed(x, num_heads, order, channels_last) for x in (qkv, dqkv))
    _differentiate(
        by_head(dout, num_heads, channels_last), *views, by_head(out, num_heads, channels_last), lse, scale, *grads
    )
    return dqkv


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, with_lse: bool) -> Tensor:
    lse = empty_lse(q, with_lse)
    if q.numel():
        native_module().attention(
            _sizes(q, k),
            DTYPE_CODES[q.dtype],
            _view(q),
            _view(k),
            _view(v),
            _view(out),
            lse.data_ptr() if with_lse else None,
            scale,
            _num_threads(q, k),
        )
    return lse


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    if not q.numel():
        dk.zero_()
        dv.zero_()
        return
    dout, lse = dout.to(q.dtype), lse.contiguous()
    native_module().attention_backward(
        _sizes(q, k),
        DTYPE_CODES[q.dtype],
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        lse.data_ptr(),
        scale,
        _view(dout),
        _view(dq),
        _view(dk),
        _view(dv),
        _num_threads(q, k),
    )


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return *q.shape[:3], k.shape[2], q.shape[3]


def _view(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()


def _num_threads(q: Tensor, k: Tensor) -> int:
    return torch.get_num_threads() if q.numel() * k.shape[2] >= PARALLEL_FROM else 1


def attention_unsupported(q: Tensor, *rest: object) -> str | None:
    return _unsupported(q)


def attention_qkv_unsupported(qkv: Tensor, *rest: object) -> str | None:
    return _unsupported(qkv)


def attention_backward_unsupported(dout: Tensor, q: Tensor, *rest: object) -> str | None:
    return _unsupported(q)


def attention_qkv_backward_unsupported(dout: Tensor, qkv: Tensor, *rest: object) -> str | None:
    return _unsupported(qkv)


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64 arithmetic is the reference's"
    return cpu_only(x)
