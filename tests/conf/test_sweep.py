"""conf/sweep.py: how `sweep.stop_worst` is read, and which of several runs goes on."""

import itertools

import pytest

from conf import sweep


@pytest.mark.parametrize(
    "text", ["0.5", "50%@25%", "0.5@25", "1.0@25%", "0.5@100%", "0.5@0%", "0@25%", "0.5@25%,0.5@50%"]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text.split("%")[0]):
        sweep.stop_worst(text)


def test_the_step_is_a_part_of_all_steps() -> None:
    assert sweep.stop_worst("0.5@25%") == sweep.StopWorst(0.5, 0.25)
    assert [sweep.stop_worst(".5@12.5%").step(steps) for steps in (1, 8, 100)] == [1, 1, 13]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_last_of_all_runs_goes_on_if_it_is_among_the_best(share: float) -> None:
    rule, losses = sweep.StopWorst(share, 0.25), [float(number) for number in range(8)]
    goes_on = [loss for loss in losses if rule.goes_on(loss, [other for other in losses if other != loss])]
    assert goes_on == losses[: round(8 * (1 - share))]


def test_the_best_run_and_the_first_one_go_on_in_any_order() -> None:
    rule = sweep.StopWorst(0.5, 0.25)
    for order in itertools.permutations([1.0, 2.0, 3.0, 4.0, 5.0]):
        goes_on = [loss for place, loss in enumerate(order) if rule.goes_on(loss, list(order[:place]))]
        assert {order[0], 1.0} <= set(goes_on)
        assert 1 <= len(goes_on) <= 5


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    rule = sweep.StopWorst(0.5, 0.25)
    assert not rule.goes_on(float("nan"), [9.0])
    assert rule.goes_on(9.0, [float("nan")])


def test_without_others_nothing_is_waited_for() -> None:
    assert sweep.StopWorst(0.9, 0.25).goes_on(100.0, [])
