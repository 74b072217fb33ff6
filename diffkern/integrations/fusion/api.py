"""`fuse` and `unfuse`: walking a model and swapping what is known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from diffkern.integrations.fusion import memory_format
from diffkern.integrations.fusion.blocks import methods_for
from diffkern.integrations.fusion.method import FusedBlock
from diffkern.integrations.fusion.report import FuseReport, Replaced, Skipped
from diffkern.integrations.fusion.signature import signature
from diffkern.integrations.fusion.submodules import has_no_hooks
from diffkern.integrations.fusion.swap import Fused, restore, swap
from diffkern.integrations.fusion.verify import NotTheSame, difference


def fuse(
    model: nn.Module, *, channels_last: bool = False, fold_upsample: bool = False, virtual_concat: bool = False
) -> FuseReport:
    """Run the blocks of ``model`` that are known on `diffkern.ops`, in place; says what it did.

    Known are the blocks of diffusers, guided-diffusion and improved-diffusion, denoising-diffusion-pytorch, EDM,
    k-diffusion and diffkern, and in any other model a ``GroupNorm`` and one followed by a ``SiLU`` in a ``Sequential``.
    In them, a norm with its time embedding, scale, shift and SiLU becomes one op, and residuals are added in place.

    model: any module; where it lies, its dtype, mode and hooks do not matter, and none of them is changed. It is the
        network itself, for example ``pipeline.unet``.
    channels_last: also store convolutions' weights channels last, and with them the activations between.
    fold_upsample: also compute nearest-neighbour ×2 and the 3×3 convolution after it as one transposed convolution on
        the small image: 4 instead of 9 multiplications, of the same result to rounding.
    virtual_concat: also let a decoder's first norm and 1×1 shortcut read the skip connection where it lies, without
        concatenating.

    Parameters keep their identity, ``state_dict`` its keys and values. Each kind of block is compared before and after
    on random numbers and left alone if it differs. What has hooks, adapters, parametrisations or a ``forward`` of its
    own is called as before, whether that was added before or comes later. Where there is no kernel for a tensor
    (float64, a device without one) a block runs as it was.

    Raises ``TypeError`` if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, for example pipeline.unet, not {type(model).__name__}")
    options = {"channels_last": channels_last, "fold_upsample": fold_upsample, "virtual_concat": virtual_concat}
    chosen = {name for name, on in options.items() if on}
    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    known: dict[object, float | NotTheSame] = {}
    computed_elsewhere: set[int] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedBlock):
            computed_elsewhere.update(id(submodule) for _, submodule in module.bypassed(module))
        if id(module) in computed_elsewhere:
            continue
        method = _method(module, chosen)
        if isinstance(method, str):
            skipped.append(Skipped(name, type(module).__name__, method))
        if method is None or isinstance(method, str):
            continue
        key = (method, signature(module))
        if key not in known:
            try:
                known[key] = difference(module, method)
            except NotTheSame as error:
                known[key] = error
        found = known[key]
        block = type(module).__name__
        if isinstance(found, NotTheSame):
            skipped.append(Skipped(name, block, str(found)))
            continue
        for inner, submodule in method.bypassed(module):
            computed_elsewhere.add(id(submodule))
            if not has_no_hooks(submodule):
                reason = "it has hooks, or a forward of its own: it is called as before"
                skipped.append(Skipped(f"{name}.{inner}".lstrip("."), type(submodule).__name__, reason))
        replaced.append(Replaced(name, block, method.effect(module), found))
        swap(module, method)
    if channels_last:
        replaced.extend(memory_format.to_channels_last(model))
    for option in sorted(chosen - {"channels_last"}):
        if not any(m.option == option for m in _fused_methods(model)):
            skipped.append(Skipped("", type(model).__name__, f"{option}: nothing in this model that it applies to"))
    return FuseReport(tuple(replaced), tuple(skipped))


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused block of ``model`` its own class, and weights their memory format, back; returns ``model``.

    The model then computes what it did before `fuse`, bit for bit. Raises ``TypeError`` if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    memory_format.restore_formats(model)
    for module in model.modules():
        if isinstance(module, Fused):
            restore(module)
    return model


def _method(module: nn.Module, options: set[str]) -> type[FusedBlock] | str | None:
    """How to fuse `module`, or why it is left alone although it is known, or None for what is not known."""
    if isinstance(module, Fused):
        return "it is fused already"
    for method in methods_for(module):
        if (method.option is None or method.option in options) and method.recognises(module):
            if isinstance(module, torch.jit.ScriptModule):
                return "a scripted module has no Python class to change"
            if "forward" in module.__dict__:
                return "its forward was replaced on the instance"
            return method
    return None


def _fused_methods(model: nn.Module) -> Iterator[type[FusedBlock]]:
    for module in model.modules():
        if isinstance(module, FusedBlock):
            yield type(module)
