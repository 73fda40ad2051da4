"""Checkpoints that other programs really write on two ranks: the merged weights are the live ones, bit for bit."""

import pytest

from tests.jobs.foreign import __main__ as foreign

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHORT = [
    "z0-bf16", "z1-bf16-frozen", "z2-bf16-nofrozen", "z2-fp32-roundrobin", "z3-bf16-nofrozen", "peft-z2-saved-head-tied",
    "hub-names-moe", "without-head", "dcp-torchtitan-tied", "lora",
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        pytest.param(2, SHORT, id="short"),
        pytest.param(2, list(foreign.NAMES), id="on2", marks=pytest.mark.proof),
        pytest.param(4, [name for name in foreign.NAMES if "trainer" not in name], id="on4", marks=pytest.mark.proof),
    ],
)
def test_weights_are_the_live_ones(ranks, names) -> None:
    found = dict(foreign.results(ranks, names))
    assert {name: value for name, value in found.items() if value != "equal" and name not in foreign.TO_REFUSE} == {}
    for name in foreign.TO_REFUSE:
        assert found[name].startswith(
            "refused: checkpoint: does not fit the model: 1 weights missing ['lm_head.weight']"
        )
