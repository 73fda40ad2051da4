"""conf/key_reference.py: what it says about keys, and that docs/keys.md is current."""

import re

import pytest

from conf import key_reference, resolve


def test_the_page_is_current() -> None:
    assert key_reference.PAGE.read_text(encoding="utf-8") == key_reference.page(), "run python -m conf.key_reference"


def test_every_key_is_there_once() -> None:
    known = key_reference.keys()
    assert [name for name in known if ".NAME." not in name] == list(resolve.keys())
    sections = {name for name, key in known.items() if key.section}
    anchors = re.findall(r'<a id="([^"]+)">', key_reference.page())
    assert sorted(anchors) == sorted(known.keys() - sections)


def test_links_lead_to_a_key_or_a_section() -> None:
    page = key_reference.page()
    headings = {re.sub(r"[^\w-]", "", line[3:].lower()) for line in page.splitlines() if line.startswith("## ")}
    targets = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert targets <= headings | set(re.findall(r'<a id="([^"]+)">', page))


@pytest.mark.parametrize(
    ("name", "default", "kind"),
    [
        ("train.learning_rate", None, "a number, 1e-20 to 100"),
        ("train.beta2", "0.95", "a number, 0 to 0.99999"),
        ("train.steps", "null", "a whole number or null, 1 to 1,000,000,000"),
        ("adapter.targets", "[all-linear]", "a list, for example [a,b]"),
        ("train.lr_schedule", "cosine", "one of cosine, linear, "),
        ("consolidate.step", "null", "a whole number, a string or null"),
        ("data.sets.NAME.weight", "1", "a number, at least 0.0001"),
        ("data.sets.NAME.format", "null", "one of auto, alpaca, "),
    ],
)
def test_default_and_type_of_a_key(name: str, default: str | None, kind: str) -> None:
    key = key_reference.keys()[name]
    assert key.default == default
    assert key.kind.startswith(kind)


def test_almost_every_key_has_a_sentence() -> None:
    without = [name for name, key in key_reference.keys().items() if not key.text and not key.section]
    assert len(without) <= 12, without
