"""Each layout trains like one process, with one task each; `make numerics` checks all tasks and writes docs/numerics.md."""

import pytest

from tests.jobs import numerics


@pytest.mark.proof
def test_every_layout_trains_like_one_process(compose, tmp_path) -> None:
    results = numerics.differences(list(numerics.some()), tmp_path, compose)
    assert {case.layout for case in results} == set(numerics.LAYOUTS)
    assert {case: value for case, value in results.items() if value > numerics.LIMIT} == {}
