import pytest
import torch

from diffkern.nn import GroupNorm


def expected(x, norm, scale=None, shift=None, silu=False):
    """The formula in float64."""
    x = x.double()
    groups = x.reshape(x.shape[0], norm.num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    var = groups.var(2, keepdim=True, correction=0)
    y = ((groups - mean) / (var + norm.eps).sqrt()).reshape(x.shape)
    column = (1, -1) + (1,) * (x.dim() - 2)
    if norm.affine:
        y = y * norm.weight.double().reshape(column) + norm.bias.double().reshape(column)
    if scale is not None:
        y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    return y * torch.sigmoid(y) if silu else y


def relative(a, b):
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def randomised(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_and_activation(activation, affine):
    norm = randomised(GroupNorm(3, 12, eps=1e-3, affine=affine, activation=activation))
    x = torch.randn(2, 12, 5, 7) + 3
    assert relative(norm(x), expected(x, norm, silu=activation == "silu")) < 1e-6


def test_scale_and_shift_may_be_halves_of_one_projection():
    norm = randomised(GroupNorm(4, 8, activation="silu"))
    x, projection = torch.randn(3, 8, 4, 4), torch.randn(3, 16)
    scale, shift = projection.chunk(2, dim=1)
    assert relative(norm(x, scale, shift), expected(x, norm, scale, shift, silu=True)) < 1e-6


def test_offset_and_skip():
    norm = randomised(GroupNorm(3, 12, activation="silu"))
    x, skip, offset = torch.randn(2, 8, 5, 7), torch.randn(2, 4, 5, 7), torch.randn(2, 12)
    joined = torch.cat([x, skip], 1).double() + offset.double()[:, :, None, None]
    assert relative(norm(x, offset=offset, skip=skip), expected(joined, norm, silu=True)) < 1e-6


def test_is_a_torch_group_norm_with_its_keys():
    theirs = randomised(torch.nn.GroupNorm(4, 8))
    ours = GroupNorm(4, 8)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.GroupNorm)
    x = torch.randn(2, 8, 6)
    assert relative(ours(x), theirs(x).double()) < 1e-6
    assert "activation=silu" in repr(GroupNorm(4, 8, activation="silu"))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="divisible"):
        GroupNorm(32, 48)
