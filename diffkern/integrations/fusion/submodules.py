"""When a submodule may be bypassed, and what is computed in its place.

A fused block does the work of its norms and activations itself. It may do so only where calling them would do nothing
else: where they are of exactly the type whose formula is known, and carry no hooks, no parametrisation (which changes
the type), no adapter (which does too) and no forward of their own. That is looked up at each call, as all of these can
come at any time; a submodule that is not plain is called.
"""

from __future__ import annotations

import importlib.util
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from diffkern import backends
from diffkern.integrations.fusion.swap import Fused
from diffkern.ops import _registry, channel_rms_norm, group_norm

_NATIVE = backends.unavailable("native") is None
_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernel(x: Any) -> bool:
    """Whether the ops have a kernel for x, or a backend is asked for by name: without one eager PyTorch is faster.

    They have none for the proxies that torch.fx traces with, and no forward-mode derivative.
    """
    if not isinstance(x, Tensor) or _registry.in_forward_mode():
        return False
    if backends.forced_backend() is not None:
        return True
    here = {"cpu": _NATIVE, "cuda": _TRITON}
    return here.get(x.device.type, False) and x.dtype in _DTYPES


def is_plain(module: Any, *types: type) -> bool:
    """Whether calling `module` is calling the forward of one of `types`, and nothing else."""
    return type(module) in types and has_no_hooks(module)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    )


def computes_silu(act: Any) -> bool:
    """Whether `act` is SiLU: torch's module or function, or the module of this name that improved-diffusion has."""
    if act is F.silu or type(act) is nn.SiLU:
        return True
    return type(act).__name__ == "SiLU" and type(act).__bases__ == (nn.Module,) and not act._parameters


def is_plain_silu(act: Any) -> bool:
    """Whether `act` is a SiLU that `normalised` may bypass."""
    return computes_silu(act) and (act is F.silu or has_no_hooks(act))


def norm_kind(module: Any) -> str | None:
    """ "group_norm" or "channel_rms_norm" if a module of this type computes that op, otherwise None.

    Known are torch's GroupNorm, the GroupNorm32 of the OpenAI codebases (which casts to float32 and back), EDM's
    GroupNorm (no subclass of torch's) and the RMSNorm of denoising-diffusion-pytorch, each also as `fuse` leaves it.
    """
    kind = type(module)
    if isinstance(module, Fused):
        kind = module.origin
    if kind is nn.GroupNorm:
        return "group_norm"
    name = kind.__name__
    if name == "GroupNorm32" and kind.__bases__ == (nn.GroupNorm,):
        return "group_norm"
    if name == "GroupNorm" and not issubclass(kind, nn.GroupNorm) and hasattr(module, "num_groups"):
        return "group_norm"
    if name == "RMSNorm" and _is_over_channels(module):
        return "channel_rms_norm"
    return None


def _is_over_channels(module: Any) -> bool:
    """Whether an RMSNorm is over axis 1: of weight g (1, C, 1, …), or (C,) and an axis that is told."""
    g = getattr(module, "g", None)
    if not isinstance(g, Tensor):
        return False
    if g.dim() == 1:
        return bool(getattr(module, "normalize_dim", None) == 1)
    return g.dim() > 2 and g.numel() == g.shape[1]


def is_plain_norm(module: Any) -> bool:
    """Whether `module` is a norm that `normalised` may bypass."""
    return norm_kind(module) is not None and has_no_hooks(module)


def normalised(
    norm: Any,
    act: Any,
    x: Tensor,
    *,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """act(norm(cat([x, skip], 1) + offset)·(1 + scale) + shift), in one op as far as norm and act are plain.

    act: a module, ``F.silu`` or None. x, skip: (N, C, …) and (N, C2, …). offset, scale, shift: (N, C + C2) or with ones
    after the first two axes.
    """
    if not (is_plain_norm(norm) and _same_dtype(norm, x, skip, offset, scale, shift)):
        if skip is not None:
            x = torch.cat([x, skip], 1)
        if offset is not None:
            x = x + _over_pixels(offset, x)
        y = norm(x)
        if scale is not None:
            y = y * (1 + _over_pixels(scale, x))
        if shift is not None:
            y = y + _over_pixels(shift, x)
        return y if act is None else act(y)
    fused_act = is_plain_silu(act)
    activation = "silu" if fused_act else None
    if norm_kind(norm) == "group_norm":
        y = group_norm(
            x,
            norm.num_groups,
            norm.weight,
            norm.bias,
            norm.eps,
            skip=skip,
            offset=offset,
            scale=scale,
            shift=shift,
            activation=activation,
        )
    else:
        if skip is not None:
            x = torch.cat([x, skip], 1)
        if offset is not None:
            x = x + _over_pixels(offset, x)
        y = rms_normalised(norm, x, scale, shift, activation)
    return y if act is None or fused_act else act(y)


def rms_normalised(
    norm: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """An RMSNorm over axis 1 with scale, shift and activation; as eager, in the widest dtype of all that it is given.

    Under autocast that is float32, from a 16-bit x and a float32 weight.
    """
    dtype = reduce(torch.promote_types, [t.dtype for t in (x, norm.g, scale, shift) if t is not None])
    scale, shift = (None if t is None else t.to(dtype) for t in (scale, shift))
    return channel_rms_norm(x.to(dtype), norm.g.to(dtype).flatten(), scale=scale, shift=shift, activation=activation)


def formatted_for(skip: Tensor, h: Tensor) -> Tensor:
    """h in the memory format of torch.cat([h, skip], 1), which is channels last only where both are.

    Convolutions keep a format, and dropout draws in its order.
    """
    return h.contiguous() if skip.is_contiguous() else h


def split_conv(conv: Any, h: Tensor, skip: Tensor) -> Tensor:
    """conv(cat([h, skip], 1)) for a 1×1 convolution `conv`, which then is the sum of one of h and one of skip."""
    weight = conv.weight.to(h.dtype)
    bias = None if conv.bias is None else conv.bias.to(h.dtype)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    x = convolve(h, weight[:, : h.shape[1]], bias)
    x += convolve(skip, weight[:, h.shape[1] :])
    return x


def can_split(conv: Any) -> bool:
    """Whether `conv` is a plain 1×1 convolution, of any number of dimensions."""
    if not is_plain(conv, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return False
    settings = (*conv.kernel_size, *conv.stride, conv.groups)
    return all(value == 1 for value in settings) and conv.padding in ("same", "valid", (0,) * len(conv.kernel_size))


def residual(x: Tensor, h: Tensor, maker: nn.Module, divisor: float = 1.0) -> Tensor:
    """(x + h) / divisor, written into h where that is the output of a plain convolution, `maker`, and nobody else's.

    A convolution's gradient does not need its output.
    """
    return add_residual(x, h, is_plain(maker, nn.Conv2d, nn.Conv1d, nn.Conv3d), divisor)


def add_residual(x: Tensor, h: Tensor, h_is_ours: bool, divisor: float = 1.0) -> Tensor:
    """(x + h) / divisor, written into h if nobody else has or needs h's values.

    h keeps what torch's own x + h would have: x's dtype and strides. Autograd allows no writing into a view that an op
    with several outputs returns, which all that an op returns is under torch.func's vmap.
    """
    alike = h.dtype == x.dtype and h.shape == x.shape and h.stride() == x.stride()
    if h_is_ours and alike and (torch.compiler.is_compiling() or not (h._is_view() or _registry.in_transform())):
        h.add_(x)
        return h if divisor == 1.0 else h.div_(divisor)
    h = x + h
    return h if divisor == 1.0 else h / divisor


def _over_pixels(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.reshape(per_channel.shape[:2] + (1,) * (x.dim() - 2))


def _same_dtype(norm: Any, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the op's result has the dtype that eager's promotion would give."""
    if norm_kind(norm) == "channel_rms_norm":
        return True
    weight = norm.weight
    if weight is not None and weight.dtype != x.dtype and not (weight.dtype == torch.float32 and x.dtype.itemsize == 2):
        return False
    return all(other is None or other.dtype == x.dtype for other in others)
