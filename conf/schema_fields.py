"""How a field of the schema is declared: with bounds, as free text, as sections under names of the user."""

from dataclasses import field
from math import inf
from typing import Any

from omegaconf import MISSING


def at_least(minimum: float, default: Any = MISSING, *, at_most: float = inf) -> Any:
    """A number with bounds. `launcher.check.rules` reads them from the field's metadata."""
    return field(default=default, metadata={"minimum": minimum, "maximum": at_most})


SEEDS = 2**32 - 1
"""The largest seed that numpy takes."""


def entries(section: type) -> Any:
    """A dictionary of sections under names that the user chooses. `conf.resolve` converts each entry to `section`."""
    return field(default_factory=dict, metadata={"section": section})


def free_text(default: Any = MISSING, *, factory: Any = None) -> Any:
    """A text for the model, tokenizer or trackers, which may have any characters. `conf.text` refuses some in all other texts."""
    metadata = {"text": "free"}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)
