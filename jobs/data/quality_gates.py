"""The quality gates: counts bad rows by kind, with examples, and decides whether they stop the run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from conf.errors import Problem
from conf.schema import Gates
from jobs.data.file_readers import Unreadable
from jobs.tokenization.conversation import EmptyText, Sample, UnknownRole

MAX_LISTED = 10
"""Rows of each gate that a message lists with their location; all rows are counted."""
DETAIL_LENGTH = 300
"""Most characters of the detail of one listed row."""
MEANINGS = {
    "unreadable": "cannot be read",
    "unusable": "do not fit the format",
    "roles": "have an unknown role",
    "empty": "have an empty question or answer",
    "unwritten": "have something that the chat template does not write",
    "overlong": "are longer than data.max_length",
    "untrained": "have no trained token",
    "endless": "do not end with an end-of-turn or end-of-text token",
    "placeholders": "have an unfilled template placeholder",
    "vocabulary": "have a token id outside the tokenizer's vocabulary",
    "duplicates": "are equal to an earlier row",
    "overlap": "are both held out and trained on",
}
"""For each gate, the end of the sentence "N rows ..."."""

# Template placeholders that nobody filled in. Braces of JSON, LaTeX and code must not match: this is a best guess from the
# text around them. Each pattern continues after a first "{", so that the combined regex begins with one fixed character,
# which makes the search fast. The lookbehinds (?<!...) check what stands before that first "{".
#
#   pattern            matches                           does not match
#   JINJA_EXPRESSION   {{ name }}  {{- a.b | trim -}}    ${{ github.ref }} of GitHub Actions
#   JINJA_BLOCK        {% if input %}  {%- endfor %}     {% a LaTeX comment
#   DOUBLE_BRACES      {{input}}  {{first_name}}         x^{{text}} of LaTeX, style={{text}} of JSX, {{0}} of C
#   SINGLE_BRACES      {instruction}  {question}: ...    value={input} of JSX, ${input} of shell, /users/{user} of a URL
COLUMNS = "instruction|input|output|question|answer|response|context|prompt|completion|query|user|assistant|system|document|text"
JINJA_EXPRESSION = r"\{(?<![$\\{]\{\{)-? [A-Za-z_][\w.\[\]'\"|() ]{0,60} -?\}\}"
JINJA_BLOCK = r"%[-+]? *(?:if|elif|else|endif|for|endfor|set)\b[^%{}\n]{0,80}%\}"
DOUBLE_BRACES = rf"\{{(?<![\w$\\^{{}}\])=]\{{\{{)(?:{COLUMNS}|[a-z]+_[a-z_]+)\}}\}}"
SINGLE_BRACES = rf"(?<![\w$\\^{{}}\])(=/]\{{)(?:{COLUMNS})\}}(?! *(?:=(?!=)|from\b))"
PLACEHOLDER = re.compile(rf"\{{(?:{JINJA_EXPRESSION}|{DOUBLE_BRACES}|{JINJA_BLOCK}|{SINGLE_BRACES})")
STRING_FORMATTING = re.compile(r"\b[fF][rR]?[\"']|\b[rR][fF][\"']|\$@?\"|\.format\(")
"""Code that fills a {name} on the same line: a Python f-string or .format(), a C# $"..."."""


@dataclass
class Findings:
    """How many rows each gate found, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """The first MAX_LISTED rows of each gate as (location, detail)."""
    checked: dict[str, int] = field(default_factory=dict)
    """How many rows a gate checked, for gates that do not check all rows."""

    def add(self, gate: str, location: str, detail: str = "") -> None:
        """Count one row."""
        self.counts[gate] = self.counts.get(gate, 0) + 1
        if len(listed := self.first.setdefault(gate, [])) < MAX_LISTED:
            listed.append((location, detail))

    def add_many(self, gate: str, locations: Iterable[str], count: int, *, checked: int | None = None) -> None:
        """Add `count` rows at once, of which `locations` names the first few; `checked` if the gate did not check all rows."""
        if count:
            checked_rows = {} if checked is None else {gate: checked}
            self.merge(Findings({gate: count}, {gate: [(location, "") for location in locations]}, checked_rows))

    def merge(self, other: "Findings") -> None:
        """Add the counts and examples of `other` to these."""
        for gate, count in other.counts.items():
            self.counts[gate] = self.counts.get(gate, 0) + count
            listed = self.first.setdefault(gate, [])
            listed += [(location, detail) for location, detail in other.first.get(gate, [])[: MAX_LISTED - len(listed)]]
        self.checked |= other.checked

    def to_json(self) -> dict[str, Any]:
        """The findings of one set as JSON values; `Findings(**values)` restores them. (`checked` is only used across sets.)"""
        return {"counts": self.counts, "first": self.first}


@dataclass(frozen=True)
class Verdict:
    """What one gate found, and whether that stops the run."""

    gate: str
    meaning: str
    count: int
    """Rows that the gate found."""
    rows: int
    """Rows that the gate checked."""
    limit: float
    """Largest allowed share of the rows, from 0 to 1."""
    stops: bool
    first: list[tuple[str, str]]
    """(location, detail) of the first few rows."""

    @property
    def key(self) -> str:
        """The config key of the gate's limit."""
        return f"data.gates.{self.gate}"

    @property
    def share(self) -> float:
        """Share of the rows, from 0 to 1. A row that was split can be counted several times, so it is capped at 1."""
        return min(1.0, self.count / max(1, self.rows))

    @property
    def percent(self) -> str:
        return f"{self.share:.2%}" if self.share >= 0.00005 else "under 0.01%"

    @property
    def problem(self) -> Problem:
        """The error to raise if `stops`."""
        reason = (
            f"{self._summary()} ({self.percent}); fix the rows, or raise this limit to allow them:{self._rows_listed()}"
        )
        return Problem(self.key, f"{self.limit:g}", reason)

    def __str__(self) -> str:
        listed = self._rows_listed()
        return f"{self._summary()} ({self.percent}, {self.key}={self.limit:g}){':' if listed else ''}{listed}"

    def _summary(self) -> str:
        return f"{self.count:,} of {self.rows:,} rows {self.meaning}"

    def _rows_listed(self) -> str:
        lines = [
            f"{location}: {' '.join(detail.split())[:DETAIL_LENGTH]}" if detail else location
            for location, detail in self.first
        ]
        more = [f"... and {self.count - len(lines):,} more"] if lines and self.count > len(lines) else []
        return "".join(f"\n  {line}" for line in [*lines, *more])


def gate_of(error: ValueError) -> str:
    """The gate that counts a row which could not be read, converted or rendered."""
    gates = {Unreadable: "unreadable", UnknownRole: "roles", EmptyText: "empty"}
    return next((gate for kind, gate in gates.items() if isinstance(error, kind)), "unusable")


def find_placeholder(sample: Sample) -> str | None:
    """The first unfilled template placeholder in any text of the sample; None if there is none."""
    texts: Iterable[str] = [turn.content for turn in sample.turns] + [part for part, _ in sample.parts]
    for text in texts:
        for match in PLACEHOLDER.finditer(text) if "{" in text else ():
            line_start, line_end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
            if not STRING_FORMATTING.search(text, line_start, len(text) if line_end < 0 else line_end):
                return match[0]
    return None


def judge(findings: Findings, rows: int, limits: Gates) -> list[Verdict]:
    """One verdict for each gate that found anything. A share exactly at the limit does not stop the run."""
    verdicts = []
    for gate, meaning in MEANINGS.items():
        if count := findings.counts.get(gate, 0):
            limit, checked = getattr(limits, gate), findings.checked.get(gate, rows)
            verdict = Verdict(gate, meaning, count, checked, limit, False, list(findings.first.get(gate, [])))
            verdicts.append(replace(verdict, stops=verdict.share > limit))
    return verdicts
