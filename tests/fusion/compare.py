"""Running a model forwards and backwards, and comparing two such runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import diffkern

TOLERANCE = 2e-5  # of the largest value
OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"channels_last": True},
    {"fold_upsample": True},
    {"virtual_concat": True},
    {"channels_last": True, "fold_upsample": True, "virtual_concat": True},
)


@dataclass
class Run:
    """What a model gave: its output, and the gradients of the tensors that went in and of the parameters."""

    output: Tensor
    gradients: dict[str, Tensor | None]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model, in eval mode, with scales and biases that are not the ones and zeros of a new one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def only_tensor(output: Any) -> Tensor:
    """The tensor of an output that diffusers' models return in one of their dataclasses."""
    if isinstance(output, Tensor):
        return output
    value = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return value.mean if hasattr(value, "mean") and not isinstance(value, Tensor) else value


def run(model: nn.Module, inputs: dict[str, Any], call: Callable[..., Any] | None = None, seed: int = 0) -> Run:
    """One evaluation and its gradients, for a fixed random upstream gradient of a mean of one; grads are None after."""
    inputs = {
        name: value.detach().clone().requires_grad_() if _has_gradient(value) else value
        for name, value in inputs.items()
    }
    torch.manual_seed(seed)
    output = only_tensor((call or model)(**inputs))
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (output * upstream).sum().backward()
    gradients = {f"input {name}": value.grad for name, value in inputs.items() if _has_gradient(value)}
    gradients |= {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Run(output.detach(), gradients)


def relative(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def assert_close(got: Run, expected: Run, tolerance: float = TOLERANCE, unfused: Run | None = None) -> None:
    """Fails unless the output and every gradient are within `tolerance` of their largest value.

    unfused: the run in float32 that `expected` has in float64. Where that itself is farther off than half of the
    tolerance, as softmax's of large scores are, twice its distance is allowed.
    A gradient that is zero but for rounding, such as that of a bias before a norm of each channel, has no relative
    error: it must stay as small beside the largest of the gradients as the tolerance says.
    """
    rounding = 1e-9 if expected.output.dtype == torch.float64 else 1e-6
    assert relative(got.output, expected.output) <= tolerance
    assert got.gradients.keys() == expected.gradients.keys()
    largest = max(float(g.abs().max()) for g in expected.gradients.values() if g is not None)
    far = {}
    for name, gradient in expected.gradients.items():
        mine = got.gradients[name]
        assert (mine is None) == (gradient is None), name
        if gradient is None:
            continue
        assert mine is not None
        own = float(gradient.abs().max())
        error = float((mine.double() - gradient.double()).abs().max())
        bound = tolerance * (own if own > rounding * largest else largest)
        if unfused is not None:
            bound = max(bound, 2 * float((unfused.gradients[name].double() - gradient).abs().max()))
        if not error <= bound:
            far[name] = error / own
    assert not far, far


def assert_same(got: Run, expected: Run) -> None:
    """Fails unless output and gradients are equal bit for bit."""
    assert torch.equal(got.output, expected.output)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        mine = got.gradients[name]
        assert mine is gradient is None or torch.equal(mine, gradient), name


def in_float64(model: nn.Module, inputs: dict[str, Any], call: Callable[..., Any] | None = None) -> Run:
    """The run of the model as it stands, with everything in float64."""
    wide = deepcopy(model).double()
    inputs = {name: value.double() if _has_gradient(value) else value for name, value in inputs.items()}
    return run(wide, inputs, None if call is None else call(wide))


def assert_fuses(
    model: nn.Module,
    inputs: dict[str, Any] | Iterable[dict[str, Any]],
    options: Iterable[dict[str, bool]] = OPTIONS,
    call: Callable[[nn.Module], Callable[..., Any]] | None = None,
    wide: bool = True,
) -> diffkern.FuseReport:
    """Fails unless the fused model gives the numbers of the unfused one in float64, and unfused its own bit for bit.

    inputs: keyword arguments of one or more calls. call: gives what to call of a model, instead of the model.
    wide: compare with the unfused model in float64; False, for models that do not run in it, with it as it stands.
    Returns the last report.
    """
    several = [inputs] if isinstance(inputs, dict) else list(inputs)
    of_model = None if call is None else call(model)
    unfused = [run(model, each, of_model) for each in several]
    expected = [in_float64(model, each, call) for each in several] if wide else unfused
    for chosen in options:
        report = diffkern.fuse(model, **chosen)
        for each, one, before in zip(several, expected, unfused, strict=True):
            assert_close(run(model, each, of_model), one, unfused=before if wide else None)
    diffkern.unfuse(model)
    for each, before in zip(several, unfused, strict=True):
        assert_same(run(model, each, of_model), before)
    return report


def classes(model: nn.Module) -> list[type]:
    """The classes of the model and all that it contains."""
    return [type(module) for module in model.modules()]


def reasons(report: diffkern.FuseReport, name: str) -> list[str]:
    """Why what has this name was left alone."""
    return [left.reason for left in report.skipped if left.name == name]


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
