import itertools

import pytest
import torch
import torch.nn.functional as F

from diffkern.nn import ResBlock

VARIANTS = list(itertools.product([False, True], [None, "up", "down"], [6, 10]))


def expected(block, x, emb):
    """The block written with torch.nn.functional in float64."""
    p = {name: parameter.double() for name, parameter in block.named_parameters()}
    x, emb = x.double(), emb.double()

    def resampled(x):
        if block.resample == "up":
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.avg_pool2d(x, 2) if block.resample == "down" else x

    h = F.silu(F.group_norm(x, 2, p["norm1.weight"], p["norm1.bias"], block.norm1.eps))
    h = F.conv2d(resampled(h), p["conv1.weight"], p["conv1.bias"], padding=1)
    e = F.linear(emb, p["emb_proj.weight"], p["emb_proj.bias"])[:, :, None, None]
    if block.scale_shift:
        scale, shift = e.chunk(2, dim=1)
        h = F.group_norm(h, 2, p["norm2.weight"], p["norm2.bias"], block.norm2.eps) * (1 + scale) + shift
    else:
        h = F.group_norm(h + e, 2, p["norm2.weight"], p["norm2.bias"], block.norm2.eps)
    h = F.conv2d(F.silu(h), p["conv2.weight"], p["conv2.bias"], padding=1)
    skip = resampled(x)
    return h + (F.conv2d(skip, p["skip.weight"], p["skip.bias"]) if "skip.weight" in p else skip)


def randomised(block):
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("scale_shift", "resample", "out_channels"), VARIANTS)
def test_equals_the_formula_forward_and_backward(scale_shift, resample, out_channels, memory_format):
    torch.manual_seed(0)
    block = ResBlock(6, out_channels, 12, num_groups=2, eps=1e-4, scale_shift=scale_shift, resample=resample)
    block = randomised(block).to(memory_format=memory_format)
    x = torch.randn(3, 6, 4, 6).contiguous(memory_format=memory_format).requires_grad_()
    emb = torch.randn(3, 12, requires_grad=True)
    got, want = block(x, emb), expected(block, x, emb)
    assert got.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(want)
    inputs = [x, emb, *block.parameters()]
    got_grads = torch.autograd.grad((got * weight.float()).sum(), inputs)
    want_grads = torch.autograd.grad((want * weight).sum(), inputs)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert (got_grad - want_grad).abs().max() <= 1e-5 * want_grad.abs().max()


def test_a_fresh_block_is_its_skip():
    x, emb = torch.randn(2, 4, 4, 4), torch.randn(2, 8)
    assert torch.equal(ResBlock(4, 4, 8, num_groups=2)(x, emb), x)


def test_dropout_is_random_in_training_only():
    block = randomised(ResBlock(4, 4, 8, num_groups=2, dropout=0.5))
    x, emb = torch.randn(2, 4, 4, 4), torch.randn(2, 8)
    assert not torch.equal(block(x, emb), block(x, emb))
    block.eval()
    assert torch.equal(block(x, emb), block(x, emb))


def test_unknown_resample():
    with pytest.raises(ValueError, match="resample"):
        ResBlock(4, 4, 8, num_groups=2, resample="sideways")
