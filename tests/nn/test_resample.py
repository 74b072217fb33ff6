import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkern.nn import Downsample, Upsample, upsample_nearest
from diffkern.nn.resample import can_fold, upsample_conv


def test_nearest_repeats_every_pixel_and_keeps_the_memory_format():
    x = torch.randn(2, 4, 3, 5)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(upsample_nearest(x), expected)
    last = upsample_nearest(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_upsample_is_a_convolution_of_the_repeated_pixels():
    layer, x = Upsample(3), torch.randn(2, 3, 4, 4)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(layer(x), torch.nn.functional.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


@pytest.mark.parametrize(("padding", "offset"), [("symmetric", -1), ("tf_same", 0)])
def test_downsample_pads_where_it_says(padding, offset):
    """With a kernel that picks its first tap, the output is every second pixel, from ``offset`` on."""
    layer, x = Downsample(1, padding), torch.randn(1, 1, 6, 8)
    with torch.no_grad():
        layer.conv.weight.zero_()[0, 0, 0, 0] = 1
        layer.conv.bias.zero_()
        picked = layer(x)
    assert picked.shape == (1, 1, 3, 4)
    for i in range(3):
        for j in range(4):
            row, column = 2 * i + offset, 2 * j + offset
            expected = x[0, 0, row, column].item() if row >= 0 and column >= 0 else 0.0
            assert picked[0, 0, i, j].item() == expected


def test_unknown_padding():
    with pytest.raises(ValueError, match="padding"):
        Downsample(4, "same")


FOLDED = (2, 5, 12, 13)  # more than 256 pixels
AS_IT_STANDS = (2, 5, 3, 7)


def two_steps(x, weight, bias):
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(repeated, weight, bias, padding=1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("out", [1, 4])
@pytest.mark.parametrize("shape", [FOLDED, (1, 1, 257, 1), (300, 3, 1, 1), AS_IT_STANDS])
def test_upsample_conv_is_a_convolution_of_the_repeated_pixels(shape, out, memory_format):
    """Values, borders included, and all gradients, in float64 to its rounding; the memory format is kept."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(memory_format=memory_format)
    weight = torch.randn(out, shape[1], 3, 3, dtype=torch.float64, generator=generator)
    bias = torch.randn(out, dtype=torch.float64, generator=generator) if out > 1 else None
    inputs = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    y, expected = upsample_conv(x, weight, bias), two_steps(x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13 * expected.abs().max().item())
    if not any(t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last) for t in (x, y)):
        assert y.is_contiguous(memory_format=memory_format)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upsample_conv_sums_half_precision_weights_in_float32(dtype):
    """What is added to the convolution's own error is one rounding of each sum: within half an ulp of the largest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(FOLDED, generator=generator).to(dtype)
    weight = torch.randn(4, FOLDED[1], 3, 3, generator=generator).to(dtype)
    exact = two_steps(x.double(), weight.double(), None)
    error = (upsample_conv(x, weight).double() - exact).abs().max() / exact.abs().max()
    assert error <= 2 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = upsample_conv(x.float(), weight.float())
    assert under_autocast.dtype == dtype
    assert (under_autocast.double() - exact).abs().max() / exact.abs().max() <= 2 * torch.finfo(dtype).eps


def test_upsample_conv_folds_only_where_it_saves():
    """A small image goes through the two steps, to the bit."""
    x, weight = torch.randn(AS_IT_STANDS), torch.randn(4, AS_IT_STANDS[1], 3, 3)
    assert torch.equal(upsample_conv(x, weight), two_steps(x, weight, None))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 5, "padding": 2},
        {"padding": 0},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2},
        {"groups": 2, "padding": 1},
        {"padding_mode": "circular", "padding": 1},
    ],
)
def test_what_cannot_be_folded(settings):
    assert can_fold(nn.Conv2d(4, 6, 3, padding=1))
    assert can_fold(nn.Conv2d(4, 6, 3, padding="same"))
    assert not can_fold(nn.Conv2d(4, 6, settings.pop("kernel_size", 3), **settings))
