"""Reads the simple commands of a shell script: their words, with known variables replaced, and the variables that they get."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from conf.errors import ConfigError, Problem

OPERATORS = frozenset("();<>|&")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?:\[[@*]\])?(?::?-([^{}]*))?\}|(\w+))")
SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|`[^`\n]*`")
"""What only a shell can compute."""
OF_THE_SHELL = "${made_by_the_shell}"
ARRAY = re.compile(r"^([ \t]*\w+)=\(([^()]*)\)", re.MULTILINE)
WRAPPERS = (
    "nohup",
    "exec",
    "time",
    "env",
    "export",
    "uv",
    "run",
    "poetry",
    "if",
    "then",
    "do",
    "else",
    "sudo",
    "command",
    "!",
)


def _items(text: str) -> str:
    """The items of an array as one text, without remarks."""
    return " ".join(shlex.join(words) for line in text.splitlines() for words in _cut(line))


def commands(text: str, path: Path) -> Iterator[tuple[list[str], dict[str, str], dict[str, str]]]:
    """(words, variables of its environment, all variables) of each simple command, with known variables replaced."""
    text = ARRAY.sub(lambda match: f"{match[1]}={shlex.quote(_items(match[2]))}", SUBSTITUTION.sub(OF_THE_SHELL, text))
    known, exported = dict[str, str](), dict[str, str]()
    for words in _simple_commands(text, path):
        words = [part for word in words for part in _parts(word, known)]
        is_export = words[0] == "export"
        while words and words[0] in WRAPPERS:
            words = words[1:]
        own: dict[str, str] = {}
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            own[match[1]] = match[2]
            words = words[1:]
        if is_export:
            exported |= own | {name: known[name] for name in words if name in known}
        if is_export or not words:
            known |= own
        else:
            yield words, exported | own, known | own


def _simple_commands(text: str, path: Path) -> Iterator[list[str]]:
    """The words of each simple command: lines are joined at a backslash or an open quote, and cut at operators."""
    pending, begin = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not pending:
            begin = number
        if line.lstrip().startswith("#") and not _is_open(pending):
            continue
        pending += line
        if pending.endswith("\\") and not pending.endswith("\\\\"):
            pending = pending[:-1] + " "
            continue
        if _is_open(pending):
            pending += "\n"
            continue
        yield from _cut(pending)
        pending = ""
    if pending.strip():
        if _is_open(pending):
            raise ConfigError(Problem("FILE", path, f"has a quote in line {begin} that nothing closes"))
        yield from _cut(pending)


def _is_open(text: str) -> bool:
    """Whether a quote is open at the end."""
    try:
        shlex.split(text)
    except ValueError as error:
        return "quotation" in str(error)
    return False


def _cut(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "", True
    words: list[str] = []
    for word in lexer:
        if word.startswith("#"):
            break
        if word and set(word) <= OPERATORS:
            if word.startswith((">", "<")) and words and words[-1] in ("1", "2"):
                words.pop()
            if words:
                yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def _parts(word: str, variables: dict[str, str]) -> list[str]:
    """The word with its variables replaced; one that only names a variable with options is several words."""
    expanded = _expanded(word, variables)
    if VARIABLE.fullmatch(word) and expanded.lstrip().startswith("-"):
        return [_expanded(part, variables) for part in shlex.split(expanded)]
    return [expanded]


def _expanded(word: str, variables: dict[str, str]) -> str:
    """The word with `$NAME`, `${NAME}` and `${NAME:-default}` replaced where their value is known."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        known = variables.get(name, match[2])
        return match[0] if known is None else known

    return VARIABLE.sub(value, word)
