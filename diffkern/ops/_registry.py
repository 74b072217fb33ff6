"""torch.library glue, once for all ops.

An `Op` is one schema with several backends. Called, it takes one of three roads:

- plain tensors in eager mode go straight to the chosen backend, wrapped in an autograd.Function only if a gradient is
  wanted: half the overhead of going through the dispatcher;
- torch.func's transforms need an autograd.Function of the setup_context style (five times dearer, so only there);
- everything else (torch.compile, torch.export, fake and subclassed tensors, dispatch modes) goes through the
  registered `torch.ops.diffkern.<name>`, which has a fake and an autograd formula.

A backend is a module `diffkern.ops.<name>.<backend>` with a function `<name>` taking the schema's arguments in order,
and `<name>_unsupported(*args) -> str | None`, the reason why it cannot take these arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

from diffkern import backends

LIBRARY = torch.library.Library("diffkern", "DEF")
OPS: dict[str, Op] = {}


class _Explaining(threading.local):
    """The op whose call this thread wants explained: it stops where a backend would run."""

    op: Op | None = None


_EXPLAINING = _Explaining()


class Op:
    """One registered operation.

    schema: the torch schema without namespace, e.g. "q_sample(Tensor x0, …) -> (Tensor, Tensor)".
    package: the op's folder, e.g. "diffkern.ops.q_sample".
    fake: shapes and dtypes of the outputs, from fake tensors.
    setup_context, backward: as for torch.autograd.Function; omitted for an op without gradients.
    preference: backends in the order in which they are tried.
    preference_for: the order for given arguments of the schema, where it depends on them.
    """

    def __init__(
        self,
        schema: str,
        *,
        package: str,
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        preference: Sequence[str] = ("native", "triton", "reference"),
        preference_for: Callable[..., Sequence[str]] | None = None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.package = package
        self.preference = tuple(preference)
        self._preference_for = preference_for
        self._backends: dict[str, _Backend] = {}
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffkern::{self.name}", fake, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"diffkern::{self.name}", backward, setup_context=setup_context, lib=LIBRARY
            )
        self.differentiable = backward is not None
        self._dispatched = getattr(torch.ops.diffkern, self.name).default
        self._function = _eager_function(self, setup_context, backward)
        self._functorch_function = _functorch_function(self, setup_context, backward)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if in_forward_mode():
            _refuse_tangents(self.name, args)
        road = _road(args)
        if road == "direct":
            return self.run(*args)
        if road == "autograd":
            return self._function.apply(*args)
        if road == "functorch":
            return self._functorch_function.apply(*args)
        return self._dispatched(*args)

    def bypasses_autograd(self, args: Sequence[Any]) -> bool:
        """Whether a call would be no more than `run`: then an op may hand `run` buffers to write into."""
        return not in_forward_mode() and _road(args) == "direct"

    def run(self, *args: Any) -> Any:
        """Runs the chosen backend on real tensors, below autograd.

        Further arguments after the schema's go to the backend as they are.
        """
        if _EXPLAINING.op is self:
            raise _CalledWith(self, args)
        forced = backends.forced_backend()
        for name in self.candidates(args) if forced is None else (forced,):
            backend = self._backends.get(name) or self._load(name)
            reason = backend if isinstance(backend, str) else backend.unsupported(*args)
            if reason is None:
                return backend.function(*args)  # type: ignore[union-attr]
            if forced:
                raise RuntimeError(f"the backend {name!r} was asked for and cannot run {self.name}: {reason}")
        raise AssertionError("the reference takes everything")

    def chosen(self, args: Sequence[Any]) -> str | None:
        """The backend that `run` would take for these arguments; None where it would raise."""
        forced = backends.forced_backend()
        candidates = self.candidates(args) if forced is None else (forced,)
        return next((name for name in candidates if self.unsupported(name, args) is None), None)

    def candidates(self, args: Sequence[Any]) -> Sequence[str]:
        """The backends in the order in which they are tried for these arguments."""
        return self.preference if self._preference_for is None else self._preference_for(*args)

    def unsupported(self, backend: str, args: Sequence[Any]) -> str | None:
        """Why `backend` cannot run this call, or None if it can."""
        loaded = self._backends.get(backend) or self._load(backend)
        return loaded if isinstance(loaded, str) else loaded.unsupported(*args)

    def missing(self, backend: str) -> str | None:
        """Why `backend` runs no call of this op on this machine, or None if it is there."""
        reason = backends.unavailable(backend)
        if reason is None and importlib.util.find_spec(f"{self.package}.{backend}") is None:
            reason = f"{self.name} has no {backend} implementation"
        return reason

    def _load(self, name: str) -> _Backend | str:
        """The backend's functions, or why there are none."""
        reason = self.missing(name)
        if reason is not None:
            return reason
        module = importlib.import_module(f"{self.package}.{name}")
        if not hasattr(module, self.name):
            return f"{self.name} has no {name} implementation"
        backend = _Backend(getattr(module, self.name), getattr(module, f"{self.name}_unsupported"))
        self._backends[name] = backend
        return backend


class _Backend(NamedTuple):
    function: Callable[..., Any]
    unsupported: Callable[..., str | None]


def in_plain_eager_mode() -> bool:
    """Whether nobody is looking on: no tracing, no mode, no transform of torch.func and no `explain`."""
    return not (_recorded() or in_transform() or in_forward_mode() or _EXPLAINING.op)


def _recorded() -> bool:
    """Whether the call is traced, or happens in a mode."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
    )


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents of torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """No op passes tangents on; torch would drop them without a word. torch.func's own have torch.func's error."""
    if torch._C._are_functorch_transforms_active():
        return
    for arg in args:
        if isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"diffkern.ops: {name} has no forward-mode derivative")


def _road(args: Sequence[Any]) -> str:
    """Which way a call goes: "direct", "autograd", "functorch" or "dispatcher"."""
    if _recorded():
        return "dispatcher"
    if torch._C._are_functorch_transforms_active():
        return "functorch"
    wants_grad = False
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor or kind is Parameter:
            # A view that negates when read (a conjugate's imaginary part), zeros without memory, and autograd's
            # batched gradients.
            if arg.is_neg() or arg._is_zerotensor() or torch._C._functorch.is_legacy_batchedtensor(arg):
                return "dispatcher"
            wants_grad = wants_grad or arg.requires_grad
        elif isinstance(arg, torch.Tensor):
            return "dispatcher"
    return "autograd" if wants_grad and torch.is_grad_enabled() else "direct"


def _eager_function(
    op: Op, setup_context: Callable[..., None] | None, backward: Callable[..., Any] | None
) -> type[torch.autograd.Function]:
    """The autograd.Function of the eager road: ctx-style, four times cheaper than the setup_context style."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = op.run(*args)
            if setup_context is not None:
                setup_context(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if backward is None:
                raise RuntimeError(f"diffkern.ops: {op.name} has no derivative, so this gradient cannot be taken")
            return backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = f"{op.name}_eager"
    return Function


def _functorch_function(
    op: Op, setup_context: Callable[..., None] | None, backward: Callable[..., Any] | None
) -> type[torch.autograd.Function]:
    """The autograd.Function of torch.func's road; batched by running the op under vmap."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op._dispatched(*args)

    def nothing_saved(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def refused(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"diffkern.ops: {op.name} has no derivative, so this gradient cannot be taken")

    # Without a backward pass torch.func would take the gradient for zero.
    Function.setup_context = staticmethod(setup_context or nothing_saved)  # type: ignore[method-assign]
    Function.backward = staticmethod(backward or refused)  # type: ignore[method-assign]
    Function.__name__ = Function.__qualname__ = f"{op.name}_functorch"
    return Function


class _CalledWith(Exception):
    """Carries the arguments of an op out of its public function, where `explain` stops it."""

    def __init__(self, op: Op, args: Sequence[Any]) -> None:
        self.op, self.arguments = op, args


def explain(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """See diffkern.backends.explain."""
    from diffkern import ops

    op = _op(name)
    if not args and not kwargs:
        return _explanation(op, {backend: backends.unavailable(backend) for backend in op.preference})
    call = _arguments_of(op, getattr(ops, name, op), args, kwargs)
    return _explanation(op, {backend: op.unsupported(backend, call) for backend in op.candidates(call)})


def explain_within(name: str, call: Callable[[], Any]) -> str:
    """The same for the first call of the op inside `call`, which goes no further than that."""
    op = _op(name)
    arguments = _arguments_of(op, call, (), {})
    return _explanation(op, {backend: op.unsupported(backend, arguments) for backend in op.candidates(arguments)})


def _op(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(sorted(OPS))}, got {name!r}")
    return OPS[name]


def _explanation(op: Op, reasons: dict[str, str | None]) -> str:
    forced = backends.forced_backend()
    if forced:
        reason = reasons[forced] if forced in reasons else op.unsupported(forced, ())
        return f"{op.name}: {forced} (asked for)" + (f", which cannot run: {reason}" if reason else "")
    order = list(reasons)
    chosen = next(backend for backend in order if reasons[backend] is None)
    passed_over = [f"not {b}: {reasons[b]}" for b in order[: order.index(chosen)]]
    return "; ".join([f"{op.name}: {chosen}", *passed_over])


def _arguments_of(op: Op, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """The schema's arguments that the public function makes of a call, without running it."""
    generator = kwargs.get("generator")
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    _EXPLAINING.op = op
    try:
        with torch.no_grad():
            function(*args, **kwargs)
    except _CalledWith as called:
        return called.arguments
    finally:
        _EXPLAINING.op = None
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)
    raise AssertionError(f"{op.name} returned without reaching its backend")
