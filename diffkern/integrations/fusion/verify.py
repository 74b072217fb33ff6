"""Comparing a block with what it is about to become, on random numbers.

A name and attributes are a guess; what a block computes decides. It is called before and after with the same random
input and, through ``torch.func.functional_call``, with random parameters in float32 on the CPU: so a convolution that
starts at zero hides nothing, half precision blurs nothing, and the model's own tensors are neither changed nor moved.
Hooks are put aside meanwhile; attributes, buffers and generators are given back as they were. What a call leaves in
attributes and buffers counts as well: a norm that keeps a running mean, say, is not bypassed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.dropout import _DropoutNd

from diffkern import backends
from diffkern.integrations.fusion.method import FusedBlock
from diffkern.integrations.fusion.swap import restore, swap
from diffkern.integrations.fusion.traces import Attributes, generators_kept, seed_generators

TOLERANCE = 2e-5  # of the largest value; rounding gives some 1e-6, a wrong formula 1e-2 and more
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotTheSame(Exception):
    """Why a block is left alone."""


def difference(module: nn.Module, method: type[FusedBlock]) -> float:
    """max|after − before| / max|before| over training and evaluation mode; `module` is as it was afterwards.

    Raises `NotTheSame` with the reason if that is above `TOLERANCE`, if an input was changed by one alone, or if the
    block cannot be called with the example.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    largest = 0.0
    with _undisturbed(module):
        state = _example_state(module, generator)
        for training in (False, True):
            for submodule in module.modules():
                submodule.training = training
            with _reason("an input for it cannot be made"):
                arguments, keywords = method.example(module, draw), method.example_keywords(module)
            before, kept_before = _called(module, state, arguments, keywords)
            try:
                swap(module, method)
            except TypeError as error:
                raise NotTheSame(f"Python does not change its class: {error}") from error
            try:
                after, kept_after = _called(module, state, arguments, keywords)
            finally:
                restore(module)
            if kept_before != kept_after:
                names = ", ".join(sorted(kept_before ^ kept_after))
                raise NotTheSame(f"the fused block does not assign the same attributes: {names}")
            largest = max(largest, _relative(after, before))
    if not largest <= TOLERANCE:
        raise NotTheSame(f"the fused block differs by {largest:.1e} of the largest value")
    return largest


def _example_state(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random parameters, the same for tied ones, and copies of the buffers.

    A module has one name here, however many it is known by: what ``functional_call`` is given for a second name stays
    in the module for good.
    """
    drawn: dict[int, Tensor] = {}
    state = {}
    for prefix, inner in module.named_modules():
        for name, parameter in inner.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if id(parameter) not in drawn:
                drawn[id(parameter)] = _random(name, parameter, generator)
            state[name] = drawn[id(parameter)]
        for name, buffer in inner.named_buffers(prefix, recurse=False, remove_duplicate=False):
            state[name] = _on_cpu(buffer)
    return state


def _called(
    module: nn.Module, state: dict[str, Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[list[Tensor], set[str]]:
    """The outputs and, as a block may write into them, arguments and buffers; and names of attributes it assigned."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    arguments = tuple(_copied(argument) for argument in arguments)
    attributes = Attributes(module)
    seed_generators()
    try:
        with _reason("it cannot be tried on a random input"):
            outputs = functional_call(module, state, arguments, keywords, tie_weights=False)
    finally:
        changed = attributes.changed()
        attributes.restore()
    tensors = list(_tensors(outputs))
    if not tensors:
        raise NotTheSame("it returns no tensor")
    buffers = [state[name] for name, _ in module.named_buffers()]
    return [tensor.detach() for tensor in (*tensors, *_tensors(arguments), *buffers)], changed


def _relative(after: list[Tensor], before: list[Tensor]) -> float:
    if [(t.shape, t.dtype) for t in after] != [(t.shape, t.dtype) for t in before]:
        raise NotTheSame("the fused block's outputs have other shapes or dtypes")
    worst = 0.0
    for a, b in zip(after, before, strict=True):
        if not torch.equal(a, b):
            error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
            if not math.isfinite(error):
                raise NotTheSame("on a random input its result is not finite")
            worst = max(worst, error)
    return worst


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for element in value:
            yield from _tensors(element)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(element) for key, element in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_copied(element) for element in value)
    return value


@contextmanager
def _reason(what: str) -> Iterator[None]:
    """Turns whatever a stranger's module raises into the reason for leaving it alone."""
    try:
        yield
    except Exception as error:
        raise NotTheSame(f"{what}: {type(error).__name__}: {error}") from error


def _on_cpu(buffer: Tensor) -> Tensor:
    """A copy of a buffer, in float32 if it is floating-point; ones for one without values, on the device meta."""
    dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
    return torch.ones(buffer.shape, dtype=dtype) if buffer.is_meta else buffer.detach().to("cpu", dtype, copy=True)


def _random(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Values that keep activations near one: weights by their fan-in, scales around one."""
    if not parameter.is_floating_point():
        return _on_cpu(parameter)
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() > 1 and parameter[0].numel() > 1:
        return values / parameter[0].numel() ** 0.5
    return 0.3 * values + (0 if name.endswith("bias") else 1)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """No hooks, no gradients, no autocast, torch's own defaults of dtype and device; all is given back as it was.

    So are training flags, and attributes that say what dtype a module works in: that is float32 meanwhile, as the
    parameters are. Dropout drops half, so that it shows where it stands: its rate may be changed later.
    """
    attributes = Attributes(module)
    of_all = [(registered, registered.copy()) for registered in _hooks_of_all()]
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(generators_kept())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if backends.unavailable("native") is not None:
            stack.enter_context(backends.use_backend("reference"))
        try:
            for registered, _ in of_all:
                registered.clear()
            for m in module.modules():
                own = vars(m)
                own.update({name: type(own[name])() for name in _HOOKS if name in own})
                own.update({name: torch.float32 for name, value in own.items() if isinstance(value, torch.dtype)})
                if isinstance(m, _DropoutNd):
                    m.p = 0.5
            yield
        finally:
            for registered, earlier in of_all:
                registered.update(earlier)
            attributes.restore()


def _hooks_of_all() -> list[dict[int, Any]]:
    """Torch's registries of hooks for every module."""
    return [getattr(hooks_of_all, f"_global{name}") for name in _HOOKS]
