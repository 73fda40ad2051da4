"""Rules for the keys with which other programs push to the Hub. Muster pushes once, when the model is merged and verified."""

from collections.abc import Mapping
from typing import Any

from launcher.convert.keys import Outcome, Row, Rule, described, kept, refused, unneeded

PRIVATE = "the repository is private unless hub.private=false; the token comes from HF_TOKEN or `hf auth login`"


def repository(*, needs_switch: bool) -> Rule:
    """`hub_model_id`. A Trainer pushes only with `push_to_hub`; Axolotl needs no such switch."""

    @described(f"`hub.push`: {PRIVATE}")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        if needs_switch and not config.get("push_to_hub"):
            return Row(key, value, Outcome.unneeded, why="nothing is pushed without push_to_hub")
        if str(value).count("/") != 1:
            return Row(key, value, Outcome.refused, why=f"names no owner: set hub.push=OWNER/{value}")
        return Row(key, value, Outcome.changed, {"hub.push": value}, PRIVATE)

    return rule


@described("`hub.push` says it; refused without a `hub_model_id`")
def push_to_hub(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if not value:
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    if config.get("hub_model_id"):
        return Row(key, value, Outcome.unneeded, why="hub.push says it")
    return Row(key, value, Outcome.refused, why="names no repository: set hub.push=owner/name")


@described("not needed: Muster pushes the merged model, once")
def strategy(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    why = "Muster pushes the merged model, once"
    if value not in ("end", False):
        why += "; checkpoints stay in the run folder"
    return Row(key, value, Outcome.unneeded, why=why)


RULES: dict[str, Rule] = {
    "push_to_hub": push_to_hub,
    "hub_model_id": repository(needs_switch=True),
    "hub_strategy": strategy,
    "hub_private_repo": kept("hub.private"),
    "hub_revision": kept("hub.revision"),
    "hub_always_push": unneeded("Muster pushes once"),
    "hub_token": refused("secrets are named, not written: export HF_TOKEN, or hub.token=NAME of another variable"),
}
