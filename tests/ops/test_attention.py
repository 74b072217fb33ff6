"""attention and attention_qkv against float64, over the shapes of the U-Nets in use, and beside PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern.backends import explain, unavailable, use_backend
from diffkern.ops import attention, attention_qkv
from diffkern.ops.attention import choice
from tests.ops import oracles
from tests.ops.cases import STORAGE, Untouched, assert_as_good_as_eager, error, in_layout, randn, same_bits

ORDERS = ("hqkvc", "qkvhc", "hcqkv")
INF, NAN = float("inf"), float("nan")

# (heads, T, K, d): every head dimension of the networks in use, with fewer heads; cross attention to 77 tokens, four
# memory keys; one position; numbers that are a multiple of nothing.
SHAPES = [
    (2, 64, 64, 8),
    (1, 256, 256, 8),
    (4, 49, 53, 32),
    (1, 70, 77, 40),
    (2, 64, 64, 64),
    (1, 33, 77, 80),
    (1, 64, 64, 96),
    (1, 40, 40, 128),
    (1, 64, 77, 160),
    (1, 31, 31, 192),
    (1, 64, 64, 256),
    (1, 17, 17, 512),
    (1, 1, 1, 8),
    (3, 1, 5, 16),
    (2, 5, 1, 3),
    (1, 7, 301, 4),
    (1, 263, 259, 5),
]
# More than any block of a kernel: beyond 256 keys the softmax is made in pieces.
LONG = [(1, 1024, 1024, 64), (1, 517, 1031, 8), (1, 300, 300, 512)]


def operands(heads: int, t: int, k: int, d: int, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    rows = [randn(2, n, heads * d, seed=i).to(dtype) for i, n in enumerate((t, k, k))]
    return rows if channels_last else [x.transpose(1, 2).contiguous() for x in rows]


def gradients(function, leaves: list[Tensor], *rest) -> list[Tensor]:
    """The result and the gradients that a random one of it gives."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, *rest)
    dout = randn(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool) -> None:
    heads = shape[0]
    given = operands(*shape, dtype, channels_last)
    with Untouched(*given):
        found = gradients(lambda *qkv: attention(*qkv, heads, channels_last=channels_last), given)
    oracle = (heads, None, channels_last)
    exact = gradients(oracles.attention, [x.double() for x in given], *oracle)
    eager = gradients(oracles.attention, given, *oracle)
    for name, f, e, other in zip(("out", "q", "k", "v"), found, exact, eager, strict=True):
        if shape[2] > 1 or name in ("out", "v"):  # of one score the softmax is 1, whatever it is
            assert_as_good_as_eager(f, e, other, (shape, dtype, channels_last, name))
    again = gradients(lambda *qkv: attention(*qkv, heads, channels_last=channels_last), given)
    assert all(same_bits(a, b) for a, b in zip(again, found, strict=True))
    with torch.no_grad():  # without the rows' sums
        assert same_bits(attention(*given, heads, channels_last=channels_last), found[0])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shapes_of_networks(backend, shape, dtype):
    check(shape, dtype, channels_last=True)
    check(shape, dtype, channels_last=False)


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sequences(backend, shape):
    check(shape, torch.float32, channels_last=False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_packed_channels_are_those_of_the_order(backend, order, channels_last):
    """The same bits as of separate tensors, forward and backward; the gradient is packed as qkv is."""
    heads, d, t = 3, 5, 19
    qkv = in_layout(randn(2, 3 * heads * d, t), "transposed" if channels_last else "contiguous")
    qkv = qkv.transpose(1, 2) if channels_last else qkv
    call = lambda x: attention_qkv(x, heads, order=order, channels_last=channels_last)  # noqa: E731
    found = gradients(call, [qkv])
    parts = oracles.unpacked(qkv, heads, order, channels_last)
    expected = gradients(lambda *three: attention(*three, heads, channels_last=channels_last), parts)
    gradient = torch.stack(oracles.unpacked(found[1], heads, order, channels_last))
    for f, e in ((found[0], expected[0]), (gradient, torch.stack(expected[1:]))):
        assert f.shape == e.shape
        assert same_bits(f, e) if backend != "reference" else error(f, e) < 1e-6


def test_a_sample_and_a_head_depend_on_nothing_beside_them(backend):
    """Bit for bit: in any batch, with any other heads, and NaN in another head stays there."""
    qkv = randn(3, 3 * 4 * 8, 21)
    whole = gradients(lambda x: attention_qkv(x, 4, order="hqkvc"), [qkv])
    close = same_bits if backend != "reference" else lambda a, b: error(a, b) < 1e-6
    alone = attention_qkv(qkv[1:2, 24:48], 1, order="hqkvc")
    assert close(alone, whole[0][1:2, 8:16])
    spoiled = qkv.clone()
    spoiled[0, 24 + 3, 5] = NAN
    found = gradients(lambda x: attention_qkv(x, 4, order="hqkvc"), [spoiled])
    assert found[0][0, 8:16, 5].isnan().all()  # its query
    for f, w in zip(found, whole, strict=True):
        width = f.shape[1] // 4
        f, w = f.clone(), w.clone()
        f[0, width : 2 * width] = w[0, width : 2 * width] = 0
        assert same_bits(f, w)


@pytest.mark.parametrize("keys", [2, 40, 300])
def test_infinities_and_nan_as_in_sdpa(backend, keys):
    """Rows of scores: all −inf give 0; one −inf is left out; +inf and NaN give NaN; an infinite value goes on."""
    q, k, v = torch.ones(1, 1, 4), torch.zeros(1, keys, 4), randn(1, keys, 4)
    k[0, :, 1] = randn(keys, seed=3)
    cases = {"one -inf": (k, 0, -INF), "+inf": (k, 1, INF), "NaN": (k, 1, NAN), "value": (v, 0, INF)}
    for name, (tensor, position, value) in cases.items():
        tensor = tensor.clone()
        tensor[0, position, 2] = value
        changed = (q, tensor, v) if name != "value" else (q, k, tensor)
        exact = oracles.attention(*(x.double() for x in changed), 1, None, True)
        assert error(attention(*changed, 1), exact) < 1e-6, name
        assert same_bits(exact.isnan().float(), F.scaled_dot_product_attention(*changed).isnan().float())
    nothing = k.clone()
    nothing[0, :, 2] = -INF
    found = gradients(lambda *x: attention(*x, 1), [q, nothing, v])
    assert bool((found[0] == 0).all())
    assert bool((found[3] == 0).all())  # no weight, no gradient of the values
    assert bool((F.scaled_dot_product_attention(q, nothing, v) == 0).all())


def test_scores_beyond_float32s_exponential(backend):
    """exp(1000) is infinite, exp(−1000) is 0: only differences to the largest are taken."""
    q, k, v = 60 * randn(1, 9, 8), 60 * randn(1, 50, 8, seed=1), randn(1, 50, 8, seed=2)
    exact, eager = (oracles.attention(*(x.to(t) for x in (q, k, v)), 1, None, True) for t in (torch.float64, q.dtype))
    assert_as_good_as_eager(attention(q, k, v, 1), exact, eager, "large scores")


@pytest.mark.parametrize("largest", [1e7, 1e9, 1e12, 1e20])
def test_scores_whose_rounding_is_beyond_the_exponential(backend, largest):
    """Half a unit in the last place of 1e9 is 32: still one weight is 1 and the others are 0, whatever the block."""
    q, v = torch.ones(1, 40, 4), randn(1, 300, 4)
    q[0, ::2] *= 0.9
    k = largest * torch.linspace(-1, 1, 300).reshape(1, 300, 1).expand(1, 300, 4) * torch.tensor([1, 0.7, 0.3, 0.1])
    for keys in (k, k.flip(1)):
        out, _, _, dv = gradients(lambda q, k, v: attention(q, k, v, 1, scale=0.3), [q, keys, v])
        best = int(keys.sum(2).argmax())
        assert error(out, v[:, best : best + 1].expand(out.shape)) < 1e-6
        assert bool((dv[:, torch.arange(300) != best] == 0).all())
        assert error(dv[:, best], randn(*out.shape, seed=9).sum(1)) < 1e-6


@pytest.mark.parametrize("far", [-1e7, 1e4, 1e6, 1e7])
def test_gradients_where_scores_differ_little_far_from_0(backend, far):
    """By small integers, so that float32 has them exactly: weights come back as good as near 0."""
    q, k, v = torch.zeros(1, 3, 8), torch.zeros(1, 90, 8), randn(1, 90, 8)
    q[..., 0], q[..., 1] = far, torch.tensor([1.0, -1.0, 2.0])
    k[..., 0], k[..., 1] = 1, torch.arange(90) % 9 - 4
    for found, exact in zip(
        gradients(lambda q, k, v: attention(q, k, v, 1, scale=1.0), [q, k, v]),
        gradients(lambda q, k, v: oracles.attention(q, k, v, 1, 1.0, True), [x.double() for x in (q, k, v)]),
        strict=True,
    ):
        assert error(found, exact) < 4e-6 * max(1.0, float(exact.abs().max()))


def test_half_precisions_largest_numbers(backend):
    """All scores are 65504²·√d, and weigh the same."""
    q, v = torch.full((1, 20, 64), 65504.0).half(), randn(1, 20, 64, dtype=torch.float16)
    out, _, _, dv = gradients(lambda q, k, v: attention(q, k, v, 1), [q, q, v])
    for found, mean in ((out, v.float()), (dv, randn(*out.shape, seed=9, dtype=torch.float16).float())):
        assert error(found, mean.mean(1, keepdim=True).expand(out.shape)) < 1e-3


def test_scale_and_defaults(backend):
    q, k, v = (randn(2, 6, 12, seed=i) for i in range(3))
    assert same_bits(attention(q, k, v, 3), attention(q, k, v, 3, scale=0.5))
    assert error(attention(q, k, v, 3, scale=0.0), v.mean(1, keepdim=True).expand(v.shape)) < 1e-6
    exact = oracles.attention(q.double(), k.double(), v.double(), 3, -0.7, True)
    assert error(attention(q, k, v, 3, scale=-0.7), exact) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_to_attend_from(backend, shape):
    q, k = randn(*shape).requires_grad_(), randn(shape[0], 7, 12).requires_grad_()
    out = attention(q, k, k, 3)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert bool((k.grad == 0).all())


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last):
    q, k, v = (randn(2, n, 6, seed=i, dtype=torch.float64).requires_grad_() for i, n in enumerate((4, 5, 5)))
    if not channels_last:
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, 3, scale=0.8, channels_last=channels_last), (q, k, v))
    for order in ORDERS:
        qkv = randn(2, 5, 18, dtype=torch.float64)
        qkv = (qkv if channels_last else qkv.transpose(1, 2)).requires_grad_()
        call = lambda x, o=order: attention_qkv(x, 2, order=o, channels_last=channels_last)  # noqa: E731
        assert torch.autograd.gradcheck(call, (qkv,))


def test_some_operands_without_gradient_and_one_tensor_for_all(backend):
    x, y = randn(2, 9, 8).requires_grad_(), randn(2, 7, 8, seed=1)
    exact = x.detach().double().requires_grad_()
    dout = randn(2, 9, 8, seed=2)
    (found,) = torch.autograd.grad(attention(x, y, y, 2), x, dout)
    (wanted,) = torch.autograd.grad(
        oracles.attention(exact, y.double(), y.double(), 2, None, True), exact, dout.double()
    )
    assert error(found, wanted) < 1e-6
    (found,) = torch.autograd.grad(attention(x, x, x, 2), x, dout)
    (wanted,) = torch.autograd.grad(oracles.attention(exact, exact, exact, 2, None, True), exact, dout.double())
    assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "broadcast", "offset"])
def test_any_layout_of_the_gradient(backend, layout):
    qkv = randn(2, 36, 10).requires_grad_()
    dout = randn(2, 12, 10, seed=1)
    dout = dout[:1].expand(2, 12, 10) if layout == "broadcast" else dout
    (expected,) = torch.autograd.grad(attention_qkv(qkv, 3), qkv, dout.contiguous())
    (found,) = torch.autograd.grad(attention_qkv(qkv, 3), qkv, in_layout(dout, layout))
    assert same_bits(found, expected) if backend != "reference" else error(found, expected) < 1e-6


def test_under_autocast_it_keeps_its_dtype(backend):
    qkv = randn(2, 36, 10)
    expected = attention_qkv(qkv, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(attention_qkv(qkv, 3), expected)


def test_compiled_and_under_torch_func(backend):
    qkv, dout = randn(2, 36, 10), randn(2, 12, 10, seed=1)
    call = lambda x: attention_qkv(x, 3, order="hcqkv")  # noqa: E731
    expected = gradients(call, [qkv])
    found = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), [qkv])
    assert all(same_bits(f, e) for f, e in zip(found, expected, strict=True))
    (_, pullback) = torch.func.vjp(call, qkv)
    assert same_bits(pullback(randn(2, 12, 10, seed=9))[0], expected[1])
    batched = torch.func.vmap(call)(torch.stack([qkv, 2 * qkv]))
    assert same_bits(batched[0], call(qkv))
    assert dout.shape == expected[0].shape


def test_a_backward_pass_that_was_not_announced_is_refused(backend):
    qkv = randn(2, 36, 10).requires_grad_()
    out, _ = torch.ops.diffkern.attention_qkv(qkv, 3, "hqkvc", 0.5, False, False)
    with pytest.raises(RuntimeError, match="with_lse=False"):
        out.sum().backward()


def test_float64_is_computed_in_float64():
    given = operands(3, 9, 12, 7, torch.float64, True)
    found = gradients(lambda *x: attention(*x, 3), given)
    exact = gradients(oracles.attention, given, 3, None, True)
    assert all(error(f, e) < 2**-46 for f, e in zip(found, exact, strict=True))


def test_sdpa_as_a_backend():
    """By name without gradients; by itself where the table says that it is faster."""
    qkv = randn(2, 36, 10)
    for order in ORDERS:
        with use_backend("reference"):
            expected = attention_qkv(qkv, 3, order=order)
        with use_backend("sdpa"):
            assert error(attention_qkv(qkv, 3, order=order), expected) < 1e-6
    with use_backend("sdpa"), pytest.raises(RuntimeError, match="backward pass"):
        attention_qkv(qkv.requires_grad_(), 3)
    assert choice.preference(qkv.detach(), 64, 2**20) == choice.OURS


@pytest.mark.parametrize("region", choice.TABLE, ids=str)
def test_the_table_decides(monkeypatch, region):
    here = region._replace(device="cpu", dtypes=(torch.float32,), scores=100)
    monkeypatch.setattr(choice, "TABLE", (here,))
    q, d = randn(1, 10, region.head_channels.start), region.head_channels.start
    assert explain("attention", q, q, q, 1) == "attention: sdpa"
    assert explain("attention", q[:, :9], q[:, :9], q[:, :9], 1) != "attention: sdpa"
    assert choice.preference(q.double(), d, 100) == choice.preference(q, region.head_channels.stop, 100) == choice.OURS


@pytest.mark.skipif(unavailable("native") is not None, reason="no native module")
def test_native_refuses_float64_by_name():
    with use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        attention_qkv(randn(1, 6, 4, dtype=torch.float64), 1)
