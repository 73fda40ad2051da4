"""The colors of the pages have enough contrast, in light and in dark. axe-core cannot tell this of texts and curves in SVG."""

import re
from itertools import product

import pytest

from pages.render import TEMPLATES

TEXTS = ("ink", "soft", "link", "warn", "stop", "good", *(f"c{number}" for number in range(8)))
ON_THEIR_OWN = {"warn": "warn-back", "stop": "stop-back", "good": "good-back"}


def schemes(template: str = "style.css") -> dict[str, dict[str, str]]:
    """The colors of each scheme by name, from the first two `:root` blocks."""
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / template).read_text(encoding="utf-8"), re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks]
    return {"light": found[0], "dark": found[0] | found[1]}


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_known_pairs() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_curves_can_be_read(scheme: str) -> None:
    colors = schemes()[scheme]
    pairs = [*product(TEXTS, ("page", "card")), *ON_THEIR_OWN.items(), ("ink", "line")]
    low = {pair: ratio for pair in pairs if (ratio := contrast(colors[pair[0]], colors[pair[1]])) < 4.5}
    assert not low


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_of_the_preview_can_be_read(scheme: str) -> None:
    colors = schemes()[scheme] | schemes("preview.html.j2")[scheme]
    pairs = [
        *product(("trained-ink", "special"), ("trained", "trained-2")),
        *product(("ink", "faint", "special"), ("card", "token")),
    ]
    low = {pair: ratio for pair in pairs if (ratio := contrast(colors[pair[0]], colors[pair[1]])) < 4.5}
    assert not low
