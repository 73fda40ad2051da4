"""Refuses what would be seen only later, or never: settings without effect, shapes that cannot be, missing inputs; pure."""

from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import Config
from launcher.check import attention_rules, gpu_rules, input_rules, layer_rules, shape_rules, unused_rules
from launcher.check.observe import Facts


def problems(config: Config, facts: Facts) -> list[Problem]:
    """The problems of these rules. A run that was started keeps what it has: only what is new in it is refused."""
    earlier = set(_of_the_config(facts.existing, facts)) if facts.existing else set()
    found = [problem for problem in _of_the_config(config, facts) if problem not in earlier]
    return [*found, *input_rules.problems(config, facts.inputs, (row.columns for row in facts.first_rows))]


def _of_the_config(config: Config, facts: Facts) -> Iterator[Problem]:
    yield from unused_rules.problems(config, facts.typed)
    yield from shape_rules.problems(config, facts.model, facts.families, facts.inputs.tokens)
    yield from gpu_rules.problems(config)
    yield from attention_rules.problems(config, facts.model.fields if facts.model else None)
    yield from layer_rules.problems(config, facts.layers)
