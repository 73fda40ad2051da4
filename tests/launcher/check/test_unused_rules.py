"""launcher/check/unused_rules.py: a setting that is typed and not used is refused, also with its default as value."""

import pytest

from launcher.check import command_line, unused_rules
from tests.conftest import Compose


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["adapter.r=16"], "adapter.r"),
        (["adapter.alpha=32"], "adapter.alpha"),
        (["train.optimizer=adafactor", "train.beta1=0.9"], "train.beta1"),
        (["train.optimizer=adafactor", "train.beta2=0.95"], "train.beta2"),
    ],
)
def test_a_typed_setting_without_effect_is_named(compose: Compose, words: list[str], key: str) -> None:
    config = compose(*words)
    assert key in [problem.key for problem in unused_rules.problems(config, command_line.keys(words))]
    assert key not in [problem.key for problem in unused_rules.problems(config)]  # it has its default


@pytest.mark.parametrize(
    "word", ["cluster.train.exclusive=false", "tracker.entity=null", "cluster.container.mounts=[]"]
)
def test_to_type_that_something_is_off_is_no_problem(compose: Compose, word: str) -> None:
    assert list(unused_rules.problems(compose(word), command_line.keys([word]))) == []


def test_a_default_that_nobody_typed_is_no_problem(compose: Compose) -> None:
    assert list(unused_rules.problems(compose())) == []
