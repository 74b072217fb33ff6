"""Arguments whose dtype is not x's: every combination that the docstrings allow, and no other."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.cases import DTYPES
from tests.ops.contract import CASES
from tests.ops.contract.case import Spec
from tests.ops.contract.check import check

MIXED = [case for case in CASES if case.allowed(torch.float16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_every_combination(backend, case, dtype):
    """Results have x's dtype, each gradient its argument's; each operand is read as it is, without rounding to x's."""
    if not case.runs_on(backend, dtype):
        return
    allowed = case.allowed(dtype)
    for number, dtypes in enumerate(itertools.product(*allowed.values())):
        layout = ("contiguous", "channels_last")[number % 2]
        spec = Spec((2, 4, 3, 5), dtype, layout, dtypes=dict(zip(allowed, dtypes, strict=True)))
        mode = "grad" if number % 3 == 0 else "plain"
        check(case, spec, mode, case.make(spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_the_others_are_refused(case, dtype):
    """By an error that names the argument, and not by a result of unclear precision."""
    for name, dtypes in case.allowed(dtype).items():
        for refused in {*DTYPES, torch.int64, torch.complex64} - {*dtypes}:
            inputs = case.make(Spec((2, 4, 3, 5), dtype))
            inputs[name] = inputs[name].to(refused)
            with pytest.raises(TypeError, match=f"{name} must"):
                case.call(inputs, None)
