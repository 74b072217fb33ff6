"""The networks that the tests of fusing start from compute what their original code computed."""

import pytest

from tests.fusion.golden import NAMES, build, check_against_golden, load


@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_are_the_originals(name):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == load(name)[0]["n_params"]
    check_against_golden(model, name)
