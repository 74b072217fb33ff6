import pytest
import torch

from diffkern.nn import Downsample, Upsample, upsample_nearest


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
