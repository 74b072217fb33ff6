"""`fuse` and `unfuse`: walking a model and swapping what is known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from diffkern.integrations.fusion import memory_format
from diffkern.integrations.fusion.blocks import methods_for
from diffkern.integrations.fusion.blocks.generic import NormMethod
from diffkern.integrations.fusion.method import FusedBlock
from diffkern.integrations.fusion.override import check_override
from diffkern.integrations.fusion.report import FuseReport, Replaced, Skipped
from diffkern.integrations.fusion.signature import signature
from diffkern.integrations.fusion.submodules import has_no_hooks, norm_kind
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

    Called again, it starts over: the options of the last call hold. Raises ``TypeError`` if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, for example pipeline.unet, not {type(model).__name__}")
    options = {"channels_last": channels_last, "fold_upsample": fold_upsample, "virtual_concat": virtual_concat}
    chosen = {name for name, on in options.items() if on}
    unfuse(model)
    fusing = _Fusing(chosen)
    for around_fused in (False, True):
        for name, module in list(model.named_modules()):
            fusing.consider(name, module, around_fused)
    replaced, skipped = fusing.replaced, fusing.skipped
    had_effect = {method.option for method in _fused_methods(model)}
    if not (replaced or skipped):
        skipped.append(Skipped("", type(model).__name__, "nothing in it is known"))
    if channels_last and (stored := list(memory_format.to_channels_last(model))):
        replaced.extend(stored)
        had_effect.add("channels_last")
    for option in sorted(chosen - had_effect):
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


class _Fusing:
    """One call of `fuse`: what was found out, and what was done."""

    def __init__(self, options: set[str]) -> None:
        self.options = options
        self.replaced: list[Replaced] = []
        self.skipped: list[Skipped] = []
        self._tried: dict[object, float | NotTheSame] = {}
        self._computed_elsewhere: set[int] = set()

    def consider(self, name: str, module: nn.Module, around_fused: bool) -> None:
        """Swap the class of ``module`` if it is known and computes the same, and note what happened."""
        if isinstance(module, Fused) or id(module) in self._computed_elsewhere:
            return
        block = type(module).__name__
        for method in self._methods(module, around_fused):
            try:
                found = self._difference(module, method)
            except NotTheSame as reason:
                left = Skipped(name, block, str(reason))
                if left not in self.skipped:  # as the block with an option and without may share the reason
                    self.skipped.append(left)
                continue
            for inner, submodule in method.bypassed(module):
                self._computed_elsewhere.add(id(submodule))
                if not has_no_hooks(submodule):
                    why = "it has hooks, or a forward of its own: it is called as before"
                    self.skipped.append(Skipped(f"{name}.{inner}".lstrip("."), type(submodule).__name__, why))
            self.replaced.append(Replaced(name, block, method.effect(module), found))
            swap(module, method)
            return

    def _methods(self, module: nn.Module, around_fused: bool) -> Iterator[type[FusedBlock]]:
        """Those that recognise ``module``, with an option that is asked for before those without."""
        for method in methods_for(module):
            wanted = method.option is None or method.option in self.options
            if wanted and method.around_fused == around_fused and method.recognises(module):
                yield method

    def _difference(self, module: nn.Module, method: type[FusedBlock]) -> float:
        if isinstance(module, torch.jit.ScriptModule):
            raise NotTheSame("a scripted module has no Python class to change")
        check_override(module, method)
        for name, inner in method.bypassed(module):
            if norm_kind(inner) is not None and not isinstance(inner, Fused) and "forward" not in vars(inner):
                self._check_norm(name, inner)
        if any(is_lazy(p) for p in module.parameters()):
            raise NotTheSame("its parameters have no shape yet")
        key = (method, signature(module))
        if key not in self._tried:
            try:
                self._tried[key] = difference(module, method)
            except NotTheSame as reason:
                self._tried[key] = reason
        found = self._tried[key]
        if isinstance(found, NotTheSame):
            raise found
        return found

    def _check_norm(self, name: str, norm: nn.Module) -> None:
        """Raises `NotTheSame` if `norm` by itself is not what it seems: within a block it sees no small values."""
        try:
            self._difference(norm, NormMethod)
        except NotTheSame as reason:
            raise NotTheSame(f"its {name} is another norm: {reason}") from reason


def _fused_methods(model: nn.Module) -> Iterator[type[FusedBlock]]:
    for module in model.modules():
        if isinstance(module, FusedBlock):
            yield type(module)
