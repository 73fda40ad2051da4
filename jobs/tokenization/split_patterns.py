"""Reads the regular expression that a byte-level tokenizer splits text by, and rewrites it for speed with tiktoken."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.tokenization.offsets import Unsupported

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of `ByteLevel(use_regex=True)`."""
DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same pattern after `Digits(individual_digits=True)`, which splits before and after every digit."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
SYNTAX = re.compile(
    r"""\(\?(?:i?:|<?[!=]) | \((?!\?) | \|                       # groups, lookaround, alternatives
    | (?: \\[pP]\{\w+\} | \\[sSrntd] | \\\W                       # classes and escapes
    | \[\^?(?:\\[pP]\{\w+\}|\\[sSrntd]|\\\W|(?!--)[^][\\&~])+\]   # sets, but no nested sets
    | [^][\\(){}|.^$*+?] | \)                                     # literals, and the end of a group
    ) (?: (?:[*+?]|\{\d+(?:,\d*)?\}) (?![*+?]) )?""",
    re.VERBOSE,
)
"""The regex syntax with the same meaning in Oniguruma (used by tokenizers) and in tiktoken's engine (Rust's fancy-regex).

They differ elsewhere: in Oniguruma `$` matches at the end of a line, and `{1,3}+` repeats again; in tiktoken's `{1,3}+` is
possessive.
"""
SEPARATOR, CUT = "\ufdd0", "\ufdd1"
"""SEPARATOR stands between texts and for an added token, CUT inside a run of whitespace. Both are Unicode noncharacters."""
RESERVED = frozenset((SEPARATOR, CUT))
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""All characters that `\\s` matches."""
LOOKAHEAD = r"|\s+(?!\S)"
"""Leaves the last whitespace character of a run to what follows it. With lookahead tiktoken uses a backtracking engine and
takes 1.5 times as long."""
TEXT, RUN, OTHER = range(3)
"""Kinds of characters. RUN: whitespace of which a pattern matches several only by `LOOKAHEAD`."""


def read_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The split pattern of a tokenizer.json's `pre_tokenizer`. Raises Unsupported if it is not a single known-safe pattern."""
    steps = [pre_tokenizer or {"type": None}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    first, last = steps[0], steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        raise Unsupported("its pre-tokenizer does not split text into bytes by one pattern")
    if len(steps) == 1 and last["use_regex"]:
        return GPT2
    if len(steps) == 2 and last["use_regex"] and first == {"type": "Digits", "individual_digits": True}:
        return DIGITS
    if len(steps) == 1 or last["use_regex"] or first["type"] != "Split":
        raise Unsupported("its pre-tokenizer does not split text into bytes by one pattern")
    keeps_matches = (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    pattern = str(first["pattern"].get("Regex", ""))
    if not keeps_matches or not pattern or SYNTAX.sub("", pattern):
        raise Unsupported("tiktoken may interpret its split pattern differently")
    return pattern


def kinds_of_units(pattern: str) -> NDArray[np.uint8] | None:
    """Kind of each UTF-16 unit (65536,), for a pattern whose `LOOKAHEAD` can be replaced by `cut_runs`. Else None.

    In these patterns only `LOOKAHEAD` and the `\\s+` after it match two characters of kind RUN, or one RUN character after any
    other. Llama 3 and Qwen match line ends, and whitespace before them, by `\\s*[\\r\\n]+`.
    """
    if pattern not in (GPT2, LLAMA3, QWEN):
        return None
    kinds = np.full(2**16, TEXT, dtype=np.uint8)
    kinds[list(map(ord, WHITESPACE))] = RUN
    kinds[list(map(ord, RESERVED if pattern == GPT2 else {*RESERVED, *"\r\n"}))] = OTHER
    return kinds


def cut_runs(text: str, unit_kinds: NDArray[np.uint8]) -> str:
    """Insert CUT before the last character of each whitespace run that text follows: there `LOOKAHEAD` would end a token.

    `"a   b"` becomes `"a  " + CUT + " b"`.
    """
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    kinds = unit_kinds[units]
    cuts = np.flatnonzero((kinds[:-2] == RUN) & (kinds[1:-1] == RUN) & (kinds[2:] == TEXT)) + 1
    return np.insert(units, cuts, ord(CUT)).tobytes().decode("utf-16-le") if len(cuts) else text
