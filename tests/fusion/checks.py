"""Comparing a model before and after `fuse`: outputs, gradients, training steps."""

from __future__ import annotations

import copy

import torch

from tests.fusion.golden import relative

TOLERANCE = 2e-5  # of the largest value of each tensor


def randomised(model, seed=0):
    """`model` with no weight at zero, at one or at the mean of what it multiplies: so that none hides another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and parameter[0].numel() > 1:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * values + (0 if name.endswith("bias") else 1))
    return model


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(model, x, *args, **kwargs):
    """The output of a call with a fixed seed, and the gradients of its product with fixed numbers.

    As `out`, `grad.x` and `grad.NAME` of each parameter, which are None where they are not reached.
    """
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    torch.manual_seed(0)
    out = model(x, *args, **kwargs)
    (out * images(*out.shape, seed=2).to(out.dtype)).sum().backward()
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "grad.x": x.grad, **gradients}


def distance(a, b):
    """‖a − b‖ / ‖b‖: of what is in 16 bit, where the largest difference is one rounding or two."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def assert_same(found, expected, tolerance=TOLERANCE):
    assert list(found) == list(expected)
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    assert [getattr(v, "dtype", None) for v in found.values()] == [getattr(v, "dtype", None) for v in expected.values()]
    errors = {key: relative(found[key], expected[key]) for key in found if expected[key] is not None}
    beyond = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not beyond, beyond


def assert_bitwise(found, expected):
    assert list(found) == list(expected)
    differ = [key for key in found if expected[key] is not None and not torch.equal(found[key], expected[key])]
    assert not differ


def trained(model, x, *args, steps=2):
    """The parameters after `steps` of Adam towards zero, from those of `model`, which is left as it is.

    Its eps keeps it from making steps of full length out of gradients that are rounding.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-2)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, *args).square().sum().backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def recorded(model, x, *args, kinds, then=None):
    """What forward hooks on the submodules of class names `kinds` see: (name, output) in the order of the calls.

    After these, the same tensors as they are when the call is over: nothing may have been written into them since.
    `then` is done to the model between registering the hooks and calling it.
    """
    seen, kept = [], []

    def record(name):
        def hook(module, inputs, output):
            seen.append((name, output.detach().clone()))
            kept.append((name, output.detach()))

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if type(module).__name__ in kinds
    ]
    if then is not None:
        then(model)
    assert not seen
    torch.manual_seed(0)
    with torch.no_grad():
        model(x, *args)
    for handle in handles:
        handle.remove()
    return seen + kept
