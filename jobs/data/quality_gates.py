"""The gates that rows pass before they are trained on: what was found of each kind, where, and whether it stops the run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from conf.errors import Problem
from conf.schema import Gates
from jobs.data.sources import Unreadable
from jobs.tokenization.conversation import Empty, Sample, UnknownRole

FIRST = 10
"""Places that a message names; all are counted."""
LONGEST = 300
"""Characters of what is said of one place."""
MEANINGS = {
    "unreadable": "cannot be read",
    "unusable": "do not fit the format",
    "roles": "have an unknown speaker",
    "empty": "have an empty question or answer",
    "overlong": "are longer than data.max_length",
    "untrained": "have no trained token",
    "endless": "do not end with a token that ends a turn or the text",
    "placeholders": "have a template's hole left open",
    "vocabulary": "have a token id that the tokenizer lacks",
    "duplicates": "are equal to a row before",
    "overlap": "are held out, and trained on too",
}
"""Of each gate: what is said of its rows."""
NAMES = "instruction|input|output|question|answer|response|context|prompt|completion|query|user|assistant|system|document|text"
HOLE = re.compile(
    r"\{(?:"  # first, and what may not stand before it behind: the search for one letter is fast
    r"\{(?<![$\\{]\{\{)-? [A-Za-z_][\w.\[\]'\"|() ]{0,60} -?\}\}"  # {{ name }}, and not ${{ name }}, a GitHub action's
    rf"|\{{(?<![\w$\\^{{}}\])=]\{{\{{)(?:{NAMES}|[a-z]+_[a-z_]+)\}}\}}"  # {{input}}, and not LaTeX's x^{{n}} or C's {{0}}
    r"|%[-+]? *(?:if|elif|else|endif|for|endfor|set)\b[^%{}\n]{0,80}%\}"
    rf"|(?<![\w$\\^{{}}\])(=/]\{{)(?:{NAMES})\}}(?! *(?:=(?!=)|from\b))"  # {input}, and not JSX's value={input}
    r")"
)
"""A template's hole that nobody filled. Braces of JSON, LaTeX and code are none, as far as a look at them can tell."""
FORMATTED = re.compile(r"\b[fF][rR]?[\"']|\b[rR][fF][\"']|\$@?\"|\.format\(")
"""On the line of a {name}: code that fills it."""


@dataclass
class Findings:
    """How many rows each gate found, and the first of them as (place, detail)."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    of: dict[str, int] = field(default_factory=dict)
    """Rows that a gate looked at, where it was not all of them."""

    def add(self, gate: str, place: str, detail: str = "") -> None:
        self.counts[gate] = self.counts.get(gate, 0) + 1
        if len(examples := self.first.setdefault(gate, [])) < FIRST:
            examples.append((place, detail))

    def note(self, gate: str, places: Iterable[str], count: int, *, of: int | None = None) -> None:
        """Add what was found at once: the places of the first few, how many there are, and of how many where not of all."""
        if count:
            looked_at = {} if of is None else {gate: of}
            self.merge(Findings({gate: count}, {gate: [(place, "") for place in places]}, looked_at))

    def merge(self, other: "Findings") -> None:
        for gate, count in other.counts.items():
            self.counts[gate] = self.counts.get(gate, 0) + count
            examples = self.first.setdefault(gate, [])
            examples += [(place, detail) for place, detail in other.first.get(gate, [])[: FIRST - len(examples)]]
        self.of |= other.of

    def plain(self) -> dict[str, Any]:
        """What was found in rows as they were read, for JSON; `Findings(**plain)` reads it back."""
        return {"counts": self.counts, "first": self.first}


@dataclass(frozen=True)
class Verdict:
    """What one gate found: `count` of `rows` rows, and whether that is more than its limit lets through."""

    gate: str
    meaning: str
    count: int
    rows: int
    limit: float
    """Share of the rows."""
    stops: bool
    first: list[tuple[str, str]]
    """(place, detail) of the first few."""

    @property
    def key(self) -> str:
        return f"data.gates.{self.gate}"

    @property
    def share(self) -> float:
        """Of the rows, from 0 to 1; a row may have been split into several that are found, and counts once."""
        return min(1.0, self.count / max(1, self.rows))

    @property
    def percent(self) -> str:
        return f"{self.share:.2%}" if self.share >= 0.00005 else "under 0.01%"

    @property
    def problem(self) -> Problem:
        """What stops the run."""
        return Problem(
            self.key,
            f"{self.limit:g}",
            f"{self._said()} ({self.percent}); mend them, or raise the share that is let through:{self._listed()}",
        )

    def __str__(self) -> str:
        listed = self._listed()
        return f"{self._said()} ({self.percent}, {self.key}={self.limit:g}){':' if listed else ''}{listed}"

    def _said(self) -> str:
        return f"{self.count:,} of {self.rows:,} rows {self.meaning}"

    def _listed(self) -> str:
        lines = [f"{place}: {' '.join(detail.split())[:LONGEST]}" if detail else place for place, detail in self.first]
        more = [f"... and {self.count - len(lines):,} more"] if lines and self.count > len(lines) else []
        return "".join(f"\n  {line}" for line in [*lines, *more])


def of_error(error: ValueError) -> str:
    """The gate of a row that could not be read, converted or rendered."""
    kinds = {Unreadable: "unreadable", UnknownRole: "roles", Empty: "empty"}
    return next((gate for kind, gate in kinds.items() if isinstance(error, kind)), "unusable")


def hole(sample: Sample) -> str | None:
    """A placeholder that nobody filled, in any text of the sample; None where there is none."""
    texts: Iterable[str] = [turn.content for turn in sample.turns] + [part for part, _ in sample.parts]
    for text in texts:
        for found in HOLE.finditer(text) if "{" in text else ():
            begin, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
            if not FORMATTED.search(text, begin, len(text) if end < 0 else end):
                return found[0]
    return None


def judged(findings: Findings, rows: int, limits: Gates) -> list[Verdict]:
    """A verdict of each gate that found something in `rows` rows; a share exactly at the limit is let through."""
    found = []
    for gate, meaning in MEANINGS.items():
        if count := findings.counts.get(gate, 0):
            limit, looked_at = getattr(limits, gate), findings.of.get(gate, rows)
            passed = Verdict(gate, meaning, count, looked_at, limit, False, list(findings.first.get(gate, [])))
            found.append(replace(passed, stops=passed.share > limit))
    return found
