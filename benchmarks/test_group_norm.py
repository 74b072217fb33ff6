"""GroupNorm + SiLU against F.silu(F.group_norm(x)), forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager
from benchmarks.conftest import assert_close
from diffkern.ops import group_norm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [
    ((8, 128, 32, 32), ""),
    ((8, 256, 8, 8), ""),
    ((64, 128, 32, 32), ""),
    ((2, 32, 4, 4), ""),
    ((8, 128, 32, 32), "scale-shift"),
]


@pytest.mark.parametrize("memory_format", list(FORMATS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("shape", "scale_shift"), CASES, ids=str)
def test_group_norm(compare, shape, scale_shift, memory_format, backward):
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=FORMATS[memory_format]).requires_grad_(backward)
    weight, bias = (torch.randn(shape[1]).requires_grad_(backward) for _ in range(2))
    extra = {}
    if scale_shift:
        extra["scale"], extra["shift"] = torch.randn(shape[0], 2 * shape[1]).requires_grad_(backward).chunk(2, dim=1)
    dy = torch.randn_like(x)

    def run(function, x, weight, bias, extra, dy):
        y = function(x, 32, weight, bias, activation="silu", **extra)
        if not backward:
            return y
        return torch.autograd.grad(y, [x, weight, bias, *extra.values()], dy)[0]

    double = [value.detach().double().requires_grad_(backward) for value in (x, weight, bias)]
    expected = run(
        eager.group_norm,
        *double,
        {name: value.detach().double().requires_grad_(backward) for name, value in extra.items()},
        dy.double(),
    )
    words = 5 if backward else 2
    compare(
        "group_norm",
        f"SiLU, {'×'.join(map(str, shape))}, {memory_format}"
        + (", scale-shift" if scale_shift else "")
        + (", forward + backward" if backward else ""),
        "eager",
        lambda: run(group_norm, x, weight, bias, extra, dy),
        lambda: run(eager.group_norm, x, weight, bias, extra, dy),
        bytes_moved=words * 4 * x.numel(),
        check=assert_close(expected.detach()),
    )
