"""Refuses a config that would write a secret to a file: every value of it goes into config.yaml, scripts and logs; pure."""

from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import Config
from conf.text import texts
from launcher.check.observe import Facts
from launcher.secret_names import MASK, found, holds_secret

VARIABLES = "cluster.environment."


def problems(config: Config, facts: Facts) -> Iterator[Problem]:
    """No message shows a secret."""
    yield from facts.secrets_file_problems
    for name in () if config.dry_run else facts.secrets_missing:
        message = f"{name} has no value. Export it, or add {name}=... to {config.cluster.secrets_file}"
        yield Problem("cluster.secrets", name, message)
    reasons = dict(facts.secrets_in_config)
    for text in texts(config):
        if text.is_name or text.key in reasons:
            continue
        if reason := _reason(text.key, text.name, text.value, text.kind):
            reasons[text.key] = reason
    for key, reason in reasons.items():
        yield Problem(key, MASK, _message(config, key, reason))


def _reason(key: str, name: str, value: str, kind: str) -> str | None:
    """What the secret in a value is; None if there is none."""
    kinds = [item for item, _ in found(value) if kind != "free" or not item.startswith("a value of")]
    if key.endswith("revision"):  # a commit has the form of a key of W&B
        kinds = [item for item in kinds if item != "a key of W&B"]
    if not kinds and name and kind != "free" and holds_secret(name, value):
        return "a secret by its name"
    return kinds[0] if kinds else None


def _message(config: Config, key: str, reason: str) -> str:
    name = key.removeprefix(VARIABLES)
    if name != key:
        put = f"add cluster.secrets=[{name}] and put {name}=... into {config.cluster.secrets_file} (mode 600)"
        return f"would be written to files. Remove it, {put}; it is {reason}"
    put = f"put NAME=... into {config.cluster.secrets_file} (mode 600) and add cluster.secrets=[NAME]"
    return f"holds {reason}, and would be written to files. Write it without that; if a job needs it, {put}"
