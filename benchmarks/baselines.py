"""Baselines that may be missing on a machine: torch.compile needs a compiler, diffusers must be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Unavailable(Exception):
    """A side of a comparison that cannot run here; the message becomes the row's reason."""


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile(function, fullgraph=True, mode=mode) for one set of shapes, compiled at the first call.

    That call raises `Unavailable` if there is no working compiler.
    """
    torch._dynamo.reset()  # each benchmark compiles for itself; recompilations are not to add up to dynamo's limit
    fast = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    ready = False

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal ready
        if ready:
            return fast(*arguments, **named)
        try:
            result = fast(*arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Unavailable(f"torch.compile failed: {first_line(error)}") from error
        ready = True
        return result

    return call


def ddpm_scheduler() -> Any:
    """diffusers' DDPMScheduler at its defaults: 1000 linear betas, σ² = β̃, x0 clipped; all 1000 steps set.

    Raises `Unavailable` without diffusers.
    """
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise Unavailable(f"diffusers does not import: {first_line(error)}") from error
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(1000)
    return scheduler


def scheduler_pair(name: str, noise: str) -> tuple[Any, Any]:
    """(diffusers' scheduler, ours) of that class name at their defaults; ours makes its noise as `noise` says.

    Raises `Unavailable` without diffusers.
    """
    try:
        import diffusers

        from diffkern.integrations import diffusers as ours
    except ImportError as error:
        raise Unavailable(f"diffusers does not import: {first_line(error)}") from error
    return getattr(diffusers, name)(), getattr(ours, name)(noise=noise)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
