"""linear_attention and its gradients: layouts, dtypes and odd shapes against float64, and what is not finite."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from diffkern.backends import unavailable, use_backend
from diffkern.ops import linear_attention
from tests.fusion.peers import lucidrains
from tests.ops import oracles
from tests.ops.cases import LAYOUTS, STORAGE, Untouched, assert_as_good_as_eager, error, in_layout, randn, same_bits

# (B, heads, d, T, M). One pixel; odd ones; no whole vector; d of one, and of no whole vectors; more pixels than a
# kernel's block, and more blocks than one unit sums up; as many heads as lucidrains has.
SHAPES = [
    (1, 1, 1, 1, None),
    (2, 4, 32, 64, 4),
    (2, 1, 8, 1, 1),
    (3, 2, 8, 17, None),
    (1, 3, 5, 33, 4),
    (2, 2, 32, 31, 1),
    (1, 1, 64, 100, 4),
    (2, 1, 64, 7, None),
    (1, 2, 40, 513, 9),
    (5, 1, 1, 3, 4),
]
LONG = [(1, 1, 32, 9001, 4), (1, 2, 8, 20011, 1), (1, 1, 64, 4099, None), (1, 1, 130, 700, 4), (2, 1, 3, 2050, 1100)]
EMPTY = [(0, 2, 4, 5, 3), (2, 2, 4, 0, 3), (2, 2, 4, 0, None), (0, 1, 2, 0, 1)]

Operands = tuple[Tensor, Tensor | None, Tensor]


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout: str, channels_last: bool = False) -> Operands:
    """qkv, memory and a gradient of the result."""
    samples, heads, d, length, remembered = shape
    qkv = in_layout((2 * randn(samples, 3 * heads * d, length, seed=1)).to(dtype), layout)
    dout = randn(samples, heads * d, length, seed=3).to(dtype)
    memory = None if remembered is None else randn(2, heads, d, remembered, seed=2).to(dtype)
    return (qkv.transpose(1, 2), memory, dout.transpose(1, 2)) if channels_last else (qkv, memory, dout)


def gradients(function, qkv: Tensor, heads: int, memory: Tensor | None, dout: Tensor, **options) -> list[Tensor]:
    """The result and the gradients of qkv and of memory, if there is one."""
    leaves = [t.detach().requires_grad_() for t in (qkv, memory) if t is not None]
    out = function(leaves[0], heads, memory=leaves[1] if len(leaves) > 1 else None, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def in_float64(function=oracles.linear_attention):
    return lambda *args, **options: function(*args, dtype=torch.float64, **options)


def equal(backend: str, a: Tensor, b: Tensor) -> bool:
    """Bit for bit; the reference's sums are torch's, whose order depends on strides."""
    return error(a, b) < 1e-6 if backend == "reference" else same_bits(a, b)


def check(shape: tuple[int, ...], qkv: Tensor, memory: Tensor | None, dout: Tensor, **options) -> None:
    heads = shape[1]
    with Untouched(qkv, dout, *([] if memory is None else [memory])):
        found = gradients(linear_attention, qkv, heads, memory, dout, **options)
    exact = gradients(in_float64(), qkv, heads, memory, dout, **options)
    eager = gradients(oracles.linear_attention, qkv, heads, memory, dout, **options)
    for name, f, e, other in zip(("out", "qkv", "memory"), found, exact, eager, strict=False):
        assert f.dtype == (memory if name == "memory" else qkv).dtype
        if shape[2] > 1 or name != "qkv":  # of one channel q' is a constant, and what eager leaves of it is rounding
            assert_as_good_as_eager(f, e, other.to(f.dtype), (shape, name))
        else:
            assert error(f, e) < 1e-5 if f.dtype == torch.float32 else error(f, e) < 2e-2
    again = gradients(linear_attention, qkv, heads, memory, dout, **options)
    assert all(same_bits(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape(backend, layout, dtype):
    for number, shape in enumerate([*SHAPES, *EMPTY]):
        channels_last = number % 2 == 1
        options = {"channels_last": channels_last, "scale": None if number % 3 else 0.3}
        check(shape, *operands(shape, dtype, layout, channels_last), **options)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_large_samples(backend, shape, channels_last):
    if backend == "triton" and shape[2] > 64:
        pytest.skip("such wide heads are the reference's")
    check(shape, *operands(shape, torch.float32, "contiguous", channels_last), channels_last=channels_last)


def test_float64_is_computed_in_float64():
    for shape, layout in itertools.product([*SHAPES, LONG[0], *EMPTY], ("contiguous", "channels_last", "sliced")):
        qkv, memory, dout = operands(shape, torch.float64, layout)
        found = gradients(linear_attention, qkv, shape[1], memory, dout)
        exact = gradients(oracles.linear_attention, qkv, shape[1], memory, dout)
        for f, e in zip(found, exact, strict=True):
            assert error(f, e) < 2**-40, shape  # in float32 it would be 2**-23


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_result_lies_in_memory_as_qkv_does(backend, channels_last):
    for innermost in ("channels", "pixels"):
        layout = "contiguous" if innermost == "pixels" else "channels_last"
        qkv, memory, dout = operands((2, 2, 8, 9, 4), torch.float32, layout, channels_last)
        axis = 2 if (innermost == "channels") == channels_last else 1
        for x in gradients(linear_attention, qkv, 2, memory, dout, channels_last=channels_last)[:2]:
            assert x.stride(axis) == 1 == qkv.stride(axis)


def test_both_orders_of_axes_are_the_same_attention(backend):
    qkv, memory, dout = operands((2, 3, 8, 21, 4), torch.float32, "contiguous")
    first = gradients(linear_attention, qkv, 3, memory, dout)
    last = gradients(
        linear_attention, qkv.transpose(1, 2), 3, memory, dout.transpose(1, 2).contiguous(), channels_last=True
    )
    last = [*(x.transpose(1, 2) for x in last[:2]), last[2]]
    assert all(equal(backend, a, b) for a, b in zip(last, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_in_float32_beside_16_bits(backend, dtype):
    """As a parameter under autocast; its gradient is float32 too."""
    shape = (2, 2, 8, 19, 4)
    qkv, _, dout = operands(shape, dtype, "contiguous")
    memory = randn(2, 2, 4, 8, seed=2).transpose(2, 3)
    found = gradients(linear_attention, qkv, 2, memory, dout)
    exact = gradients(in_float64(), qkv, 2, memory, dout)
    assert found[2].dtype == torch.float32
    assert error(found[2], exact[2]) < 1e-6
    assert error(found[0], exact[0]) < torch.finfo(dtype).eps


def test_memory_in_any_strides(backend):
    qkv, memory, dout = operands((2, 2, 8, 19, 4), torch.float32, "contiguous")
    expected = gradients(linear_attention, qkv, 2, memory, dout)
    for layout in LAYOUTS[:4]:
        found = gradients(linear_attention, qkv, 2, in_layout(memory, layout), dout)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    one = memory[:1].expand(2, -1, -1, -1)
    found = gradients(linear_attention, qkv, 2, one, dout)
    exact = gradients(linear_attention, qkv, 2, one.contiguous(), dout)
    assert all(same_bits(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_dout_does_not_matter(backend, layout):
    qkv, memory, dout = operands((2, 2, 8, 19, 4), torch.float32, "contiguous")
    for gradient in (dout, dout[:, :1, :1].expand_as(dout)):
        expected = gradients(linear_attention, qkv, 2, memory, gradient.contiguous())
        placed = in_layout(gradient, layout)
        found = gradients(linear_attention, qkv, 2, memory, placed)
        if layout == "broadcast":
            expected = gradients(linear_attention, qkv, 2, memory, placed.contiguous())
        assert all(equal(backend, a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("wanted", ["qkv", "memory"])
def test_one_gradient_alone(backend, wanted):
    qkv, memory, dout = operands((2, 2, 8, 19, 4), torch.float32, "contiguous")
    position = ["qkv", "memory"].index(wanted)
    expected = gradients(linear_attention, qkv, 2, memory, dout)[1 + position]
    leaves = [qkv, memory]
    leaves[position] = leaves[position].detach().requires_grad_()
    out = linear_attention(leaves[0], 2, memory=leaves[1])
    (found,) = torch.autograd.grad(out, leaves[position], dout)
    assert same_bits(found, expected)


@pytest.mark.parametrize("heads_d_memory", [(1, 3, None), (2, 2, 3), (2, 4, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last, heads_d_memory):
    heads, d, remembered = heads_d_memory
    for length in (1, 5):
        qkv, memory, _ = operands((2, heads, d, length, remembered), torch.float64, "contiguous", channels_last)
        leaves = [t.detach().requires_grad_() for t in (qkv, memory) if t is not None]
        function = lambda x, m=None: linear_attention(x, heads, memory=m, channels_last=channels_last)  # noqa: E731
        assert torch.autograd.gradcheck(function, leaves)


INFINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", INFINITE)
@pytest.mark.parametrize("part", ["q", "k", "v", "memory k", "memory v"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_not_finite_is_where_torchs_softmax_has_it(backend, channels_last, part, value):
    """One value, one channel, one pixel, and all of a head; of a few pixels, and of more than a block."""
    for length in (5, 40):
        for place in ((3, 2), (3, slice(None)), (slice(None), 2), (slice(None), slice(None))):
            qkv, memory, dout = operands((2, 2, 8, length, 4), torch.float32, "contiguous")
            if part.startswith("memory"):
                memory["kv".index(part[-1]), 1][place] = value
            else:
                qkv.unflatten(1, (3, 2, 8))[1, "qkv".index(part), 1][place] = value
            if channels_last:
                qkv, dout = qkv.transpose(1, 2), dout.transpose(1, 2)
            with torch.no_grad():
                found = linear_attention(qkv, 2, memory=memory, channels_last=channels_last)
            exact = oracles.linear_attention(qkv, 2, memory, None, channels_last, torch.float64)
            assert error(found, exact) < 1e-5, (part, place)
            both = [
                gradients(f, qkv, 2, memory, dout, channels_last=channels_last)
                for f in (linear_attention, in_float64())
            ]
            for f, e in zip(*both, strict=True):
                assert torch.equal(f.isfinite(), e.isfinite()), (part, place)
                assert error(f.where(f.isfinite(), 0.0), e.where(e.isfinite(), 0.0)) < 1e-5


def test_large_keys(backend):
    """A softmax without its maximum would pass float32's range, and keys of one block would hide those of another."""
    shape = (1, 2, 8, 3000, 4)
    qkv, memory, dout = operands(shape, torch.float32, "contiguous")
    for offset in (200.0, -200.0):
        slope = torch.linspace(0, offset, shape[3])
        for direction in (slope, slope.flip(0)):
            shifted = qkv.clone()
            shifted[:, 16:32] += direction
            check(shape, shifted, memory, dout)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sample_does_not_depend_on_its_batch(backend, channels_last):
    if backend == "reference":
        pytest.skip("torch's products depend on the sizes of the batch")
    qkv, memory, dout = operands((4, 2, 8, 300, 4), torch.float32, "contiguous", channels_last)
    whole = gradients(linear_attention, qkv, 2, memory, dout, channels_last=channels_last)
    for n in range(4):
        one = slice(n, n + 1)
        alone = gradients(linear_attention, qkv[one], 2, memory, dout[one], channels_last=channels_last)
        assert same_bits(alone[0], whole[0][one])
        assert same_bits(alone[1], whole[1][one])


def test_a_second_derivative_is_refused_with_a_reason(backend):
    qkv = randn(1, 12, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(linear_attention(qkv, 2).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention_backward has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("remembered", [None, 3])
def test_compiled_without_breaks_and_under_torch_func(backend, remembered):
    qkv, memory, dout = operands((2, 2, 4, 9, remembered), torch.float32, "contiguous")
    expected = gradients(linear_attention, qkv, 2, memory, dout)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, qkv, 2, memory, dout)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    found = torch.func.grad(lambda x: (linear_attention(x, 2, memory=memory) * dout).sum())(qkv)
    assert same_bits(found, expected[1])


def test_values_changed_between_the_passes_are_refused():
    qkv = randn(1, 12, 5).requires_grad_()
    out = linear_attention(qkv, 2)
    qkv.data = randn(1, 12, 6)
    with pytest.raises(RuntimeError, match="qkv had shape"):
        out.sum().backward()


@pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
def test_native_refuses_float64_by_name():
    with use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        linear_attention(randn(1, 12, 5, dtype=torch.float64), 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_denoising_diffusion_pytorchs(backend, memory_format):
    """Its module around our function, against the module itself in float64, gradients too."""
    torch.manual_seed(0)
    module = lucidrains.denoising_diffusion_pytorch().LinearAttention(12, heads=4, dim_head=32, num_mem_kv=4)
    x = randn(2, 12, 5, 7).contiguous(memory_format=memory_format).requires_grad_()
    dout = randn(2, 12, 5, 7, seed=1)

    def ours() -> Tensor:
        qkv = module.to_qkv(module.norm(x))
        return module.to_out(linear_attention(qkv.flatten(2), 4, memory=module.mem_kv).unflatten(2, (5, 7)))

    def differentiated(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out * dout.to(out.dtype)).sum(), leaves)]

    found = differentiated(ours(), [x, module.mem_kv, module.to_qkv.weight])
    doubled = x.detach().double().requires_grad_()
    module.double()
    exact = differentiated(module(doubled), [doubled, module.mem_kv, module.to_qkv.weight])
    assert all(error(f, e) < 5e-6 for f, e in zip(found, exact, strict=True))
