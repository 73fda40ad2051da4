"""The patterns that byte-level tokenizers split texts by: which of them tiktoken reads alike, and how it does so sooner."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.tokenization.offsets import Unfit

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel(use_regex=True)` splits by."""
DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same after `Digits(individual_digits=True)`, which ends a text before and after every digit."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
SYNTAX = re.compile(
    r"""\(\?(?:i?:|<?[!=]) | \((?!\?) | \|                       # groups, looks, alternatives
    | (?: \\[pP]\{\w+\} | \\[sSrntd] | \\\W                       # classes and escapes
    | \[\^?(?:\\[pP]\{\w+\}|\\[sSrntd]|\\\W|(?!--)[^][\\&~])+\]   # sets, without sets in them
    | [^][\\(){}|.^$*+?] | \)                                     # letters, and a group's end
    ) (?: (?:[*+?]|\{\d+(?:,\d*)?\}) (?![*+?]) )?""",
    re.VERBOSE,
)
"""The part of a regular expression that Oniguruma, which tokenizers uses, and tiktoken's engine read alike: the first ends a
line at `$`, and repeats where the second is possessive at `{1,3}+`."""
SIGNS = frozenset((HERE := "\ufdd0", CUT := "\ufdd1"))
"""Written between texts and for added tokens, and inside of runs of blanks: no characters, and Unicode keeps them free."""
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
"""What `\\s` is."""
AHEAD = r"|\s+(?!\S)"
"""Leaves a run's last blank to what follows it. For this tiktoken takes another engine, and half as long again."""
SOLID, RUN, OTHER = range(3)
"""Kinds of characters: RUN are the blanks that a pattern takes several of by `AHEAD` alone."""


def read(before: dict[str, Any] | None) -> str:
    """What the texts are split by, where it is one pattern."""
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before or {"type": None}]
    first, last = steps[0], steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        raise Unfit("its texts are not split by one pattern into bytes")
    if len(steps) == 1 and last["use_regex"]:
        return GPT2
    if len(steps) == 2 and last["use_regex"] and first == {"type": "Digits", "individual_digits": True}:
        return DIGITS
    if len(steps) == 1 or last["use_regex"] or first["type"] != "Split":
        raise Unfit("its texts are not split by one pattern into bytes")
    whole = (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    pattern = first["pattern"].get("Regex", "")
    if not whole or not pattern or SYNTAX.sub("", pattern):
        raise Unfit("its texts are split by a pattern that tiktoken may read in another way")
    return pattern


def runs(pattern: str) -> NDArray[np.uint8] | None:
    """The kind of every UTF-16 unit, for a pattern that can do without `AHEAD` where `parted` does the same; else None.

    Of these nothing but `AHEAD` and the `\\s+` behind it takes two such blanks, or one after something else. Line ends, and
    the blanks before them, Llama 3 and Qwen take by `\\s*[\\r\\n]+`.
    """
    if pattern not in (GPT2, LLAMA3, QWEN):
        return None
    kinds = np.full(2**16, SOLID, dtype=np.uint8)
    kinds[list(map(ord, BLANKS))] = RUN
    kinds[list(map(ord, SIGNS if pattern == GPT2 else {*SIGNS, *"\r\n"}))] = OTHER
    return kinds


def parted(text: str, runs: NDArray[np.uint8]) -> str:
    """With a sign before the last blank of each run that something follows, where `AHEAD` would end a token."""
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    kinds = runs[units]
    places = np.flatnonzero((kinds[:-2] == RUN) & (kinds[1:-1] == RUN) & (kinds[2:] == SOLID)) + 1
    return np.insert(units, places, ord(CUT)).tobytes().decode("utf-16-le") if len(places) else text
