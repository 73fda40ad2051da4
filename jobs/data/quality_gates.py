"""The quality gates: counts bad rows by kind, with examples, and decides whether they stop the run."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from conf.errors import Problem
from conf.schema_model import Gates
from jobs.data.file_readers import Unreadable
from jobs.tokenization.conversation import EmptyText, Sample, UnknownRole

MAX_LISTED = 10
"""How many different reasons of a gate a message lists at most. All rows are counted."""
ROWS_PER_REASON = 3
"""How many rows of a reason a message lists with their location."""
MAX_REASONS = 30
"""How many different reasons of a gate are counted one by one. This is more than MAX_LISTED, so that the counts of the listed
reasons stay right when the findings of many blocks are added up."""
DETAIL_LENGTH = 300
"""Most characters of the detail of one listed row."""
NUMBER = re.compile(r"\d[\d,.]*")
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
REMEDIES = {
    "roles": "map the roles with data.roles",
    "overlong": "raise data.max_length, use data.overlong=split",
    "untrained": "raise data.max_length if the answers were cut off",
    "endless": "name the tokens that end a turn of this chat template in data.end_of_turn",
    "vocabulary": "set model.tokenizer to the tokenizer that made the rows",
    "duplicates": "use data.drop_duplicates=true",
    "overlap": "use other rows for validation",
}
"""For each gate, what else to do than to fix the rows or to raise the limit."""
LEFT_OUT = ("unreadable", "unusable", "roles", "empty", "untrained", "vocabulary")
"""Gates that leave their rows out. If one of them finds every row, a higher limit does not help."""

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
class Reason:
    """Rows that a gate found for the same reason: their details differ only in numbers."""

    count: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)
    """The first ROWS_PER_REASON of them as (location, detail)."""

    def add(self, count: int, rows: Iterable[tuple[str, str]]) -> None:
        """Count further rows, of which `rows` are the first."""
        self.count += count
        self.rows += list(rows)[: ROWS_PER_REASON - len(self.rows)]


@dataclass
class Findings:
    """How many rows each gate found, for which reasons, and the first rows of each reason. Its size does not grow with the data."""

    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, dict[str, Reason]] = field(default_factory=dict)
    """For each gate its first MAX_REASONS reasons, by their detail without its numbers."""
    checked: dict[str, int] = field(default_factory=dict)
    """How many rows a gate checked, for gates that do not check all rows."""

    def add(self, gate: str, location: str, detail: str = "") -> None:
        """Count one row."""
        detail = " ".join(detail.split())[:DETAIL_LENGTH]
        self.counts[gate] = self.counts.get(gate, 0) + 1
        self._add_rows(gate, NUMBER.sub("0", detail), 1, [(location, detail)])

    def add_many(self, gate: str, locations: Iterable[str], count: int, *, checked: int | None = None) -> None:
        """Add `count` rows at once, of which `locations` names the first few; `checked` if the gate did not check all rows."""
        if count:
            self.counts[gate] = self.counts.get(gate, 0) + count
            self._add_rows(gate, "", count, [(location, "") for location in locations])
            if checked is not None:
                self.checked[gate] = checked

    def merge(self, other: "Findings") -> None:
        """Add the counts and examples of `other` to these."""
        for gate, count in other.counts.items():
            self.counts[gate] = self.counts.get(gate, 0) + count
            for pattern, reason in other.reasons.get(gate, {}).items():
                self._add_rows(gate, pattern, reason.count, reason.rows)
        self.checked |= other.checked

    def _add_rows(self, gate: str, pattern: str, count: int, rows: list[tuple[str, str]]) -> None:
        reasons = self.reasons.setdefault(gate, {})
        if pattern in reasons or len(reasons) < MAX_REASONS:
            reasons.setdefault(pattern, Reason()).add(count, rows)

    def with_locations(self, locate: Callable[[str], str]) -> "Findings":
        """A copy in which `locate` has replaced every location."""
        reasons = {
            gate: {
                pattern: Reason(reason.count, [(locate(location), detail) for location, detail in reason.rows])
                for pattern, reason in found.items()
            }
            for gate, found in self.reasons.items()
        }
        return Findings(dict(self.counts), reasons, dict(self.checked))

    def to_json(self) -> dict[str, Any]:
        """The findings of one set as JSON values, for `from_json`. (`checked` is only used across sets.)"""
        reasons = {
            gate: {pattern: {"count": reason.count, "rows": reason.rows} for pattern, reason in found.items()}
            for gate, found in self.reasons.items()
        }
        return {"counts": self.counts, "reasons": reasons}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restore what `to_json` returned."""
        reasons = {
            gate: {
                pattern: Reason(reason["count"], [(location, detail) for location, detail in reason["rows"]])
                for pattern, reason in found.items()
            }
            for gate, found in values["reasons"].items()
        }
        return cls(dict(values["counts"]), reasons)


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
    reasons: list[Reason]
    """The first MAX_LISTED reasons."""

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
        remedies = [REMEDIES[self.gate]] if self.gate in REMEDIES else []
        if self.gate in LEFT_OUT and self.share == 1:
            choices = ", or ".join([*remedies, "fix the rows"])
        else:
            choices = ", ".join([*remedies, "fix the rows, or raise this limit to allow them"])
        return Problem(self.key, f"{self.limit:g}", f"{self._summary()} ({self.percent}); {choices}{self._list()}")

    def __str__(self) -> str:
        return f"{self._summary()} ({self.percent}, {self.key}={self.limit:g}){self._list()}"

    def listed(self) -> list[tuple[str, str]]:
        """(location, detail) of the first rows of each reason. Where there are more, (empty, how many) follows."""
        lines: list[tuple[str, str]] = []
        for reason in self.reasons:
            lines += reason.rows
            if reason.rows and reason.count > len(reason.rows):
                same = " with the same reason" if reason.rows[0][1] else ""
                lines.append(("", f"... and {reason.count - len(reason.rows):,} more{same}"))
        rest = self.count - sum(reason.count for reason in self.reasons)
        return [*lines, ("", f"... and {rest:,} more")] if lines and rest > 0 else lines

    def _summary(self) -> str:
        return f"{self.count:,} of {self.rows:,} rows {self.meaning}"

    def _list(self) -> str:
        lines = [": ".join(part for part in line if part) for line in self.listed()]
        return "".join([":" if lines else "", *(f"\n  {line}" for line in lines)])


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
            reasons = list(findings.reasons.get(gate, {}).values())[:MAX_LISTED]
            verdict = Verdict(gate, meaning, count, checked, limit, False, reasons)
            verdicts.append(replace(verdict, stops=verdict.share > limit))
    return verdicts
