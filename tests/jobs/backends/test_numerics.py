"""Each layout's curve is that of one process; `make numerics` does all combinations, and writes docs/numerics.md."""

import pytest

from tests.jobs import numerics


@pytest.mark.slow
def test_every_layout_trains_like_one_process(compose, tmp_path):
    found = numerics.differences(list(numerics.some()), tmp_path, compose)
    assert {case.layout for case in found} == set(numerics.LAYOUTS)
    assert {case: value for case, value in found.items() if value > numerics.LIMIT} == {}
