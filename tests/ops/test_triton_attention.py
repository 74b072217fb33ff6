"""attention's Triton kernels where blocks are smaller than small tensors would have them, and the choice of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffkern.backends import unavailable
from diffkern.ops import attention, attention_qkv
from tests.ops import oracles
from tests.ops.cases import STORAGE, assert_as_good_as_eager, in_layout, randn, same_bits

if unavailable("triton"):
    pytest.skip(str(unavailable("triton")), allow_module_level=True)

from diffkern.ops._triton import launch
from diffkern.ops._triton.launch import cdiv, recorded
from diffkern.ops.attention import launch_choices
from diffkern.ops.attention import triton as kernels
from diffkern.ops.attention.launch_choices import MOST_CHANNELS, SHORT, Blocks, pieces

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
CHOOSERS = ("forward", "query_gradients", "key_gradients")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """Blocks of so many queries and keys, and heads in pieces of so many channels."""

    def force(rows: int, keys: int, piece: int = 128) -> None:
        for name in CHOOSERS:
            monkeypatch.setattr(launch_choices, name, lambda *shape: Blocks(rows, keys, 4, 1))
        monkeypatch.setattr(launch_choices, "_PIECE", piece)

    return force


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=9).to(out.dtype))]


def check(leaves: list[Tensor], heads: int, channels_last: bool, case: object) -> list[Tensor]:
    """Result and gradients, which are as good as eager's, and the same twice."""
    call = lambda *qkv: attention(*qkv, heads, channels_last=channels_last)  # noqa: E731
    formula = lambda *qkv: oracles.attention(*qkv, heads, None, channels_last)  # noqa: E731
    found, again = gradients(call, leaves), gradients(call, leaves)
    exact, eager = gradients(formula, [x.double() for x in leaves]), gradients(formula, leaves)
    for f, a, e, other in zip(found, again, exact, eager, strict=True):
        assert same_bits(f, a), case
        assert_as_good_as_eager(f, e, other, case)
    return found


def operands(t: int, k: int, channels: int, dtype: torch.dtype = torch.float32, samples: int = 1) -> list[Tensor]:
    return [randn(samples, n, channels, seed=seed).to(dtype) for seed, n in enumerate((t, k, k))]


@pytest.mark.parametrize(("t", "k"), [(1, 17), (15, 31), (16, 16), (17, 33), (32, 15), (33, 2)])
def test_the_last_block_is_full_or_not(backend, t, k, cut):
    cut(16, 16)
    check(operands(t, k, 6), 2, True, (t, k))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("keys", [SHORT, SHORT + 1])
def test_keys_at_once_and_block_by_block(backend, keys, dtype, cut):
    given = operands(5, keys, 8, dtype)
    for of_block in (512, 64):
        cut(16, of_block)
        check(given, 1, True, (keys, dtype, of_block))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("keys", [32, 37])
def test_scales_that_are_not_positive(backend, scale, keys, cut):
    cut(16, 16)
    given = operands(18, keys, 8)
    found = gradients(lambda *qkv: attention(*qkv, 2, scale=scale), given)
    exact = gradients(lambda *qkv: oracles.attention(*qkv, 2, scale, True), [x.double() for x in given])
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("head", [16, 17, 40, 48, 65])
def test_a_head_in_pieces(backend, head, dtype, cut):
    cut(16, 16, 16)
    assert len(pieces(head, 4)) == cdiv(head, 16)
    check(operands(18, 21, 2 * head, dtype), 2, True, (head, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_short_rows_are_not_rounded(backend, dtype):
    """The result is rounded once: with weights of 16 bits equal values would come out changed."""
    q, k, _ = operands(9, 200, 8, dtype)
    for value in (1.0, -0.3333, 1.703):
        v = torch.full_like(k, value)
        assert same_bits(attention(4 * q, k, v, 1), torch.full_like(q, float(v[0, 0, 0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_infinite_values_of_short_rows_stay_infinite(backend, dtype):
    """Weights of 16 bits and what is left of them have different signs, or nothing is left."""
    q, k, v = operands(9, 40, 8, dtype)
    v[0, 3, 2], v[0, 5, 4], v[0, 6, 6], v[0, 7, 6] = torch.inf, -torch.inf, torch.inf, -torch.inf
    exact = oracles.attention(q.double(), k.double(), v.double(), 1, None, True)
    found = attention(q, k, v, 1)
    assert bool((found[..., 2] == torch.inf).all())
    assert bool((found[..., 4] == -torch.inf).all())
    assert same_bits(found.isnan().float(), exact.isnan().float())


def test_blocks_whose_scores_are_all_minus_infinity(backend, cut):
    """The first, the last, all of them: such keys have no weight and no gradient."""
    cut(16, 16)
    q, k, v = operands(5, 48, 4)
    q = q.abs() + 1
    for masked in (slice(0, 16), slice(16, 48), slice(0, 32), slice(0, 48)):
        hidden, kept = k.clone(), torch.ones(48, dtype=torch.bool)
        hidden[:, masked], kept[masked] = -torch.inf, False
        found = gradients(lambda *x: attention(*x, 1), [q, hidden, v])
        if not kept.any():
            assert not found[0].any()
            assert not found[3].any()
            continue
        alone = gradients(lambda *x: attention(*x, 1), [q, k[:, kept], v[:, kept]])
        for name, f, a in zip(("out", "v"), found[::3], (alone[0], alone[3]), strict=True):
            f = f if name == "out" else f[:, kept]
            assert (f - a).abs().max() < 1e-5, (masked, name)
        assert not found[3][:, ~kept].any()


def test_the_sums_of_rows(backend, cut):
    q, k, v = operands(19, 37, 12)
    exact = torch.einsum("bthc,bkhc->bhtk", *(x.double().unflatten(2, (3, 4)) for x in (q, k))) * 0.7
    for blocks in ((16, 16), (32, 64)):
        cut(*blocks)
        lse = torch.ops.diffkern.attention(q, k, v, 3, 0.7, True, True)[1]
        assert lse.shape == (2, 1, 3, 19)
        assert (lse.double().sum(0) - exact.logsumexp(-1)).abs().max() < 1e-6
        assert torch.ops.diffkern.attention(q, k, v, 3, 0.7, True, False)[1].shape == (0,)


@pytest.mark.parametrize("order", ["hqkvc", "qkvhc", "hcqkv"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "broadcast", "offset"])
def test_views_in_every_order_and_layout(backend, order, layout, cut):
    """The same bits as of dense tensors, which lie apart; around a view is NaN."""
    cut(16, 16)
    for channels_last in (False, True):
        shape = (2, 18, 24) if channels_last else (2, 24, 18)
        qkv = in_layout(randn(*shape), layout)
        call = lambda x, last=channels_last: attention_qkv(x, 2, order=order, channels_last=last)  # noqa: E731
        found, expected = gradients(call, [qkv]), gradients(call, [qkv.contiguous()])
        assert all(same_bits(f, e) for f, e in zip(found, expected, strict=True))


def test_separate_tensors_of_different_strides(backend, cut):
    cut(16, 16)
    q, k, v = operands(18, 21, 8, samples=2)
    views = [in_layout(q, "transposed"), in_layout(k, "sliced"), in_layout(v, "broadcast")]
    expected = check([q, k, v[:1].expand(v.shape).contiguous()], 2, True, "dense")
    assert same_bits(attention(*views, 2), expected[0])


def test_large_heads_and_far_positions_are_the_references(backend, monkeypatch):
    large = randn(1, 3, MOST_CHANNELS + 1)
    assert "channels" in str(kernels.attention_unsupported(large, large, large, 1, 1.0, True, False))
    monkeypatch.setattr(launch, "unsupported", lambda x: None)
    for t, reason in ((1, "None"), (20, "spans")):
        x = torch.empty(1, device="meta").as_strided((1, t, 8), (2**40, 2**27, 1))
        assert reason in str(kernels.attention_unsupported(x, x, x, 1, 1.0, True, False))


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_gradients_of_large_heads_are_the_references_where_shared_memory_is_small(backend, capability):
    """Those of 99 KiB a block; the results are the kernels' own."""
    for channels, dtype in itertools.product((384, 385, MOST_CHANNELS), (torch.float32, torch.bfloat16)):
        x, qkv = (torch.empty(1, 4, n * channels, dtype=dtype) for n in (1, 3))
        lse = torch.empty(1, 1, 4)
        with recorded(capability):
            separate = kernels.attention_backward_unsupported(x, x, x, x, x, lse, 1, 1.0, True)
            together = kernels.attention_qkv_backward_unsupported(x, qkv, x, lse, 1, "hqkvc", 1.0, True)
            assert kernels.attention_unsupported(x, x, x, 1, 1.0, True, True) is None
        small = capability in (86, 89, 120) and channels > 384 and dtype == torch.float32
        assert separate == together
        assert ("shared memory" in str(separate)) == small


HEADS = [1, 8, 32, 40, 64, 80, 96, 128, 160, 192, 200, 256, 512]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_pieces_cover_a_head_once(backend, itemsize):
    for head in range(1, MOST_CHANNELS + 1):
        found = pieces(head, itemsize)
        assert [first for first, _ in found] == [sum(w for _, w in found[:i]) for i in range(len(found))]
        assert found[-1][0] < head <= sum(found[-1])
        assert all(16 <= width <= 128 and width & (width - 1) == 0 for _, width in found)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("capability", [80, 90])
def test_blocks_fit_on_chip(backend, capability, chooser, itemsize, monkeypatch):
    """Of what lies in shared memory at the most: a block of queries, and what the loop has in flight."""
    monkeypatch.setattr(launch_choices, "INTERPRETED", False)
    for head in HEADS:
        channels = sum(width for _, width in pieces(head, itemsize))
        for pairs, t, k in ((1, 1, 1), (8, 256, 256), (512, 64, 77), (2, 4096, 4096), (64, 1024, 257)):
            with recorded(capability):
                blocks = getattr(launch_choices, chooser)(pairs, t, k, head, itemsize, torch.device("cpu"))
            own, other = (blocks.rows, blocks.keys) if chooser != "key_gradients" else (blocks.keys, blocks.rows)
            assert min(own, other) >= 16
            assert 2 * (own + blocks.stages * other) * channels * itemsize <= launch.shared_memory(capability)


def test_a_batch_of_one_has_more_programs(backend, monkeypatch):
    monkeypatch.setattr(launch_choices, "INTERPRETED", False)
    qkv = torch.empty(1, 1024, 3 * 6 * 64, dtype=torch.bfloat16)
    with recorded() as launches:
        attention_qkv(qkv, 6, channels_last=True)
    assert launches[0].grid >= launch.multiprocessors(qkv.device)


# (with warp groups, without) of forward, query_gradients and key_gradients, in bfloat16 with many long rows.
ROWS = {
    32: ((128, 128), (64, 64), (64, 64)),
    64: ((128, 64), (64, 64), (64, 32)),
    96: ((128, 64), (64, 64), (32, 16)),
    192: ((64, 64), (32, 32), (32, 16)),
}


@pytest.mark.parametrize("head", ROWS)
@pytest.mark.parametrize("capability", [80, 86, 120])
def test_gpus_without_warp_groups_have_more_threads_and_fewer_rows_for_a_wide_head(
    backend, capability, head, monkeypatch
):
    monkeypatch.setattr(launch_choices, "INTERPRETED", False)
    shape = (512, 1024, 1024, head, 2, torch.device("cpu"))
    for chooser, (rows, without) in zip(CHOOSERS, ROWS[head], strict=True):
        choose = getattr(launch_choices, chooser)
        with recorded(capability=capability):
            found = choose(*shape)
        for other in (90, 100):
            with recorded(capability=other):
                grouped = choose(*shape)
            assert grouped.rows == rows
        expected = replace(grouped, rows=without, num_warps=8) if head > 32 else grouped
        assert found == expected, chooser
