import itertools

import pytest
import torch

from diffkern.nn import Attention

FORMATS = [torch.contiguous_format, torch.channels_last]


def channel(order, heads, d, part, head, c):
    """Where channel ``c`` of part 0 (q), 1 (k) or 2 (v) of a head lies in the packed projection."""
    if order == "hqkvc":
        return (head * 3 + part) * d + c
    if order == "qkvhc":
        return (part * heads + head) * d + c
    return (head * d + c) * 3 + part


def expected(module, x):
    """Attention head by head in float64, from single channels of the projection."""
    n, channels, height, width = x.shape
    qkv = torch.nn.functional.conv2d(module.norm(x), module.qkv.weight, module.qkv.bias).double().flatten(2)
    heads, d = module.num_heads, channels // module.num_heads
    out = torch.empty(n, channels, height * width, dtype=torch.float64)
    for sample, head in itertools.product(range(n), range(heads)):
        q, k, v = (
            torch.stack([qkv[sample, channel(module.order, heads, d, part, head, c)] for c in range(d)])
            for part in range(3)
        )
        weights = torch.softmax(q.T @ k / d**0.5, dim=1)  # (T of q, T of k)
        out[sample, head * d : (head + 1) * d] = v @ weights.T
    out = out.reshape(x.shape).float()
    return x + torch.nn.functional.conv2d(out, module.proj.weight, module.proj.bias)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("order", ["hqkvc", "qkvhc", "hcqkv"])
@pytest.mark.parametrize("heads", [1, 3])
def test_equals_attention_written_out(order, heads, memory_format):
    torch.manual_seed(0)
    module = randomised(Attention(12, num_heads=heads, order=order, num_groups=4))
    x = torch.randn(2, 12, 3, 5).contiguous(memory_format=memory_format)
    got = module(x)
    torch.testing.assert_close(got, expected(module, x), rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=memory_format)


def test_a_fresh_block_is_the_identity():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(Attention(8, num_groups=4)(x), x)


def test_channels_per_head_decide():
    assert Attention(64, num_heads=3, num_head_channels=16).num_heads == 4


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [({"num_heads": 5}, "num_heads"), ({"num_head_channels": 24}, "num_head_channels"), ({"order": "qkv"}, "order")],
)
def test_says_which_argument_is_wrong(kwargs, name):
    with pytest.raises(ValueError, match=name):
        Attention(32, **kwargs)
