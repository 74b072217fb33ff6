"""The contract of every op on every backend: DESIGN.md's matrix of dtypes, layouts, shapes, values and modes.

The whole product would be 100,000 calls of each form of an op (contract/). Instead each gets about 120, a pairwise
design: every two values of two different axes meet in some cell, in particular every shape with every kind of values
and every layout with every dtype. The design is a function of the axes and a seed (covering.py), so it is the same in
every run. Each backend runs all of it, and each instruction set the native cells with gradients (under
`slow` all native ones: test_instruction_sets.py). Triton's interpreter takes a thousand times as long as a kernel: what
it runs without `slow` has every value of every axis but the batch over 256, and not every pair.

In each cell: arguments keep every bit, their surroundings too; outputs are poisoned, and nothing beside them is
written; results and gradients are within one rounding and the error of eager PyTorch of a float64 oracle; memory format
and dtype are x's; a second call gives the same bits; what is not finite in one sample leaves the others as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.ops.cases import BACKENDS, DTYPES, LAYOUTS, same_bits
from tests.ops.contract import CASES
from tests.ops.contract.case import VALUES, OpCase, Spec
from tests.ops.contract.check import MODES, Found, check, run
from tests.ops.covering import each_value, pairwise

MANY = 256  # samples, each of them a program


def cells() -> Iterator[pytest.param]:
    for backend, (seed, case) in itertools.product(BACKENDS, enumerate(CASES)):
        dtypes = [dtype for dtype in DTYPES if case.runs_on(backend, dtype)]
        axes = (case.shapes(), VALUES, LAYOUTS, LAYOUTS, MODES, dtypes)
        design = often = set(pairwise(axes, seed))
        if backend == "triton":
            few = [shape for shape in case.shapes() if shape[0] < MANY]
            often = set(each_value((few, *axes[1:]), seed))
            design = design | often
        for row in sorted(design, key=repr):
            shape, values, layout, other, mode, dtype = row
            spec = Spec(shape, dtype, layout, other, values)
            name = f"{backend}-{case.name}-{'x'.join(map(str, shape))}-{dtype}-{layout}-{other}-{values}-{mode}"
            yield pytest.param(backend, case, spec, mode, id=name, marks=() if row in often else pytest.mark.slow)


@pytest.mark.parametrize(("backend", "case", "spec", "mode"), list(cells()), indirect=["backend"])
def test_contract(backend, case, spec, mode):
    found = check(case, spec, mode, case.make(spec))
    if spec.values in ("nan", "inf", "-inf"):
        assert_contained(case, spec, mode, found)


def assert_contained(case: OpCase, spec: Spec, mode: str, found: Found) -> None:
    """Samples other than the middle one, which is not finite, come out as they do beside a finite one."""
    bad = spec.shape[0] // 2
    clean_spec = replace(spec, values="randn")
    clean = run(case, case.make(clean_spec), clean_spec, mode)
    pairs = list(zip(found[0], clean[0], strict=True))
    gradients = zip(case.differentiable, found[1], clean[1], strict=False)
    pairs += [(a, b) for name, a, b in gradients if name in case.per_sample]
    for actual, undisturbed in pairs:
        samples = [n for n in range(actual.shape[0]) if n % spec.shape[0] != bad]
        assert same_bits(actual[samples], undisturbed[samples]), "not finite in one sample, and it shows in others"
