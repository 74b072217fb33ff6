"""group_norm's short road gives what the general road gives, takes what it should and leaves the rest."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.autograd import forward_ad

from diffkern import backends
from diffkern.ops import group_norm
from diffkern.ops.group_norm import eager

pytestmark = pytest.mark.skipif(backends.eager_native() is None, reason="the native module cannot see torch's tensors")


@pytest.fixture
def taken(monkeypatch):
    """Whether each call of group_norm was taken by the short road."""
    answers = []
    short = eager.group_norm

    def watch(*args):
        y = short(*args)
        answers.append(y is not None)
        return y

    monkeypatch.setattr(eager, "group_norm", watch)
    return answers


def by_the_general_road(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(eager, "group_norm", lambda *args: None)
        return function()


def tensors(shape, dtype=torch.float32, memory_format=torch.contiguous_format, parameters=torch.float32):
    generator = torch.Generator().manual_seed(0)
    samples, channels = shape[:2]
    x = torch.randn(shape, generator=generator).to(dtype)
    if memory_format is not torch.contiguous_format:
        x = x.contiguous(memory_format=memory_format)
    weight, bias = (torch.randn(channels, generator=generator).to(parameters) for _ in range(2))
    scale, shift, offset = torch.randn(samples, 3 * channels, generator=generator).to(parameters).chunk(3, 1)
    return [x, weight, bias, scale, shift, offset]


SHAPES = [((2, 8), torch.contiguous_format), ((3, 8, 5), torch.contiguous_format), ((2, 8, 5, 3), torch.channels_last)]
SHAPES += [((2, 8, 5, 3), torch.contiguous_format), ((2, 8, 2, 3, 2), torch.channels_last_3d), ((1, 8, 1, 1), None)]


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), SHAPES, ids=str)
def test_forward_and_backward_equal_the_general_road(monkeypatch, taken, shape, memory_format, dtype, with_scale):
    values = tensors(shape, dtype, memory_format or torch.contiguous_format)
    inputs = [v.detach().requires_grad_() for v in (values if with_scale else values[:3])]
    keywords = dict(zip(("scale", "shift", "offset"), inputs[3:], strict=False))
    dy = torch.randn_like(values[0])

    def run():
        y = group_norm(*inputs[:1], 4, *inputs[1:3], activation="silu", **keywords)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    short = run()
    general = by_the_general_road(monkeypatch, run)
    assert taken == [True]
    for a, b in zip(short, general, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def test_frozen_parameters_get_no_gradient(taken):
    x, weight, bias, *_ = tensors((2, 8, 4, 4))
    weight.requires_grad_()
    group_norm(x, 4, weight, bias, activation="silu").sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None
    assert taken == [True]


def test_module_parameters_are_plain(taken):
    module = torch.nn.GroupNorm(4, 8)
    y = group_norm(torch.randn(2, 8, 4, 4), 4, module.weight, module.bias)
    y.sum().backward()
    assert module.bias.grad is not None
    assert taken == [True]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.double(),
        lambda x: x[:0],
        lambda x: torch._neg_view(x),
        lambda x: torch.complex(x, x).conj().imag,
    ],
    ids=["sliced", "permuted", "expanded", "float64", "empty", "negated", "imaginary part of a conjugate"],
)
def test_other_tensors_are_left_to_the_general_road(taken, make):
    x = make(torch.randn(2, 8, 4, 4))
    y = group_norm(x, 2, activation="silu")
    assert taken == [False]
    if x.numel():
        expected = F.silu(F.group_norm(x.clone().double(), 2))
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_skip_is_left_to_the_general_road(taken):
    x, skip = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    y = group_norm(x, 3, skip=skip)
    torch.testing.assert_close(y, F.group_norm(torch.cat([x, skip], 1), 3))
    assert taken == []


def test_unusual_gradients_take_the_general_road():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    offset = torch.randn(2, 8, requires_grad=True)
    y = group_norm(x, 4, offset=offset, activation="silu")
    expanded = torch.ones(()).expand(y.shape)
    other_order = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    for dy in (expanded, other_order, torch._neg_view(other_order)):
        gradients = torch.autograd.grad(y, (x, offset), dy, retain_graph=True)
        exact = [t.detach().double().requires_grad_() for t in (x, offset)]
        z = F.silu(F.group_norm(exact[0] + exact[1][:, :, None, None], 4))
        for gradient, expected in zip(gradients, torch.autograd.grad(z, exact, dy.double()), strict=True):
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_batched_gradients():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    dys = torch.randn(3, 2, 8, 4, 4)
    y = group_norm(x, 4, activation="silu")
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    single = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    torch.testing.assert_close(batched, single)


def test_no_grad_and_inference_mode(taken):
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not group_norm(x, 4).requires_grad
    with torch.inference_mode():
        assert group_norm(x, 4).is_inference()
    assert taken == [True, True]


def test_forced_backends(taken):
    x = torch.randn(2, 8, 4, 4)
    with backends.use_backend("reference"):
        group_norm(x, 4)
    with backends.use_backend("native"):
        group_norm(x, 4)
    assert taken == [False, True]


def test_explain_runs_nothing():
    x = torch.randn(2, 8, 4, 4)
    assert backends.explain("group_norm", x, 4) == "group_norm: native"


def test_changed_input_is_noticed():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    doubled = x * 2
    y = group_norm(doubled, 4, activation="silu")
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def without_memory(x):
    x.untyped_storage().resize_(0)
    return x


def test_tensors_without_memory_are_not_read(taken):
    x, weight, *_ = tensors((2, 8, 4, 4))
    zeros = torch._efficientzerotensor(x.shape)
    assert not group_norm(zeros, 4, activation="silu").any()
    with pytest.raises(RuntimeError, match="storage"):
        group_norm(without_memory(x.clone()), 4)
    with pytest.raises(ValueError, match="no memory"):
        group_norm(x, 4, without_memory(weight))
    functional = torch._to_functional_tensor(x.clone())
    torch.testing.assert_close(torch._from_functional_tensor(group_norm(functional, 4)), group_norm(x, 4))
    assert taken == [False] * 4 + [True]
    leaf = x.clone().requires_grad_()
    assert not torch.autograd.grad(group_norm(leaf, 4), leaf, zeros)[0].any()


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize(("before", "after"), [((1, 8, 2, 2), (64, 8, 9, 9)), ((64, 8, 9, 9), (1, 8, 2, 2))])
def test_another_shape_behind_autograds_back(monkeypatch, before, after, short):
    if not short:
        monkeypatch.setattr(eager, "group_norm", lambda *args: None)
    x = torch.randn(before, requires_grad=True)
    y = group_norm(x, 4, activation="silu")
    x.data = torch.randn(after)
    with pytest.raises(RuntimeError, match="x had shape"):
        y.sum().backward()


@pytest.mark.parametrize("change", [lambda s: s[:, :1], lambda s: s.bfloat16()], ids=["smaller", "another dtype"])
def test_other_statistics_from_hooks(change):
    x = torch.randn(64, 8, 3, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.dim() == 3 else t):
        y = group_norm(x, 4)
    with pytest.raises(RuntimeError, match="statistics came back as"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    x, weight, bias, *_ = (v.requires_grad_() for v in tensors((2, 8, 4, 4)))

    def block(x):
        return group_norm(x, 4, weight, bias, activation="silu").square()

    expected = torch.autograd.grad(block(x).sum(), [x, weight, bias])
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a.grad, b) for a, b in zip((x, weight, bias), expected, strict=True))


def test_traced_by_torch_jit():
    x, other = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: group_norm(x, 4), x)
    assert torch.equal(traced(other), group_norm(other, 4))


def test_no_second_derivative():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(group_norm(x, 4).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_backward has no derivative"):
        torch.autograd.grad(slope.sum(), x)


def test_no_forward_mode_derivative():
    x = torch.randn(2, 8, 4, 4)
    with forward_ad.dual_level():
        assert torch.equal(group_norm(x, 4), group_norm(x.clone(), 4))
        with pytest.raises(NotImplementedError, match="group_norm has no forward-mode derivative"):
            group_norm(forward_ad.make_dual(x, x), 4)
        with pytest.raises(NotImplementedError, match="group_norm has no forward-mode derivative"):
            group_norm(x, 4, forward_ad.make_dual(torch.ones(8), torch.ones(8)))


def test_no_reference_is_kept():
    x, weight, bias, scale, shift, offset = inputs = [v.requires_grad_() for v in tensors((2, 8, 4, 4))]
    held = [*inputs, torch.float32, torch.empty_like, torch.empty]

    def call():
        y = group_norm(x, 4, weight, bias, scale=scale, shift=shift, offset=offset)
        torch.autograd.grad(y.sum(), inputs)

    call()
    before = [sys.getrefcount(one) for one in held]
    for _ in range(100):
        call()
    assert all(abs(sys.getrefcount(one) - count) < 50 for one, count in zip(held, before, strict=True))
