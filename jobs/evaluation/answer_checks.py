"""What can be seen to be wrong with an answer without understanding it: nothing said, a loop, a broken template, no end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from jobs.tokenization import chat_template

FAULTS = {
    "empty": "say nothing",
    "looping": "end in a loop",
    "template": "have tokens of the chat template inside",
    "endless": "had not ended after generate.max_new_tokens",
}
"""Every fault, in words that follow a number of answers."""
PERIOD, TIMES, TAIL = 64, 3, 24
"""A loop: the longest n-gram, in tokens, how often it stands there at least, and how many tokens that makes at least."""
MARKERS = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
"""How chat templates write the beginning and end of a turn."""


@dataclass(frozen=True)
class Special:
    """Of a tokenizer and its template, the tokens that an answer may have at its end only."""

    ids: frozenset[int]
    ends: frozenset[int]
    """Those that end an answer."""
    markers: tuple[str, ...]
    """What a template writes around turns, also where it is made of plain tokens."""


def special(words: PreTrainedTokenizerBase) -> Special:
    ends = {words.convert_tokens_to_ids(token) for token in chat_template.ends(words)}
    added = {number for number, token in words.added_tokens_decoder.items() if token.special}
    text = words.chat_template if isinstance(words.chat_template, str) else ""
    return Special(
        frozenset(added | set(words.all_special_ids)), frozenset(ends), tuple(sorted(set(MARKERS.findall(text))))
    )


def faults(ids: Sequence[int], text: str, known: Special) -> list[str]:
    """Names of FAULTS that an answer has; `ids` are its tokens with the one that ended it, `text` is what is read of them.

    empty      nothing but blanks is left without special tokens
    looping    its last tokens repeat, see `loops`
    template   a special token stands before its end, or a marker of the chat template in its text
    endless    its last token ends no turn
    """
    ended = ended_by(ids, known)
    said = list(ids[:-1] if ended else ids)
    found = {
        "empty": not text.strip(),
        "looping": loops(said),
        "template": any(token in known.ids for token in said) or any(marker in text for marker in known.markers),
        "endless": not ended,
    }
    return [name for name, wrong in found.items() if wrong]


def ended_by(ids: Sequence[int], known: Special) -> bool:
    return bool(ids) and ids[-1] in known.ends


def loops(ids: Sequence[int]) -> bool:
    """Whether the tokens end in an n-gram of 1 to PERIOD tokens that stands there TIMES times or more on end, the first
    time perhaps cut off in front, which makes TAIL tokens or more: for some n the last max(TIMES * n, TAIL) tokens each
    equal the one n before."""
    for period in range(1, PERIOD + 1):
        length = max(TIMES * period, TAIL)
        if length > len(ids):
            return False
        tail = ids[len(ids) - length :]
        if all(tail[at] == tail[at - period] for at in range(period, length)):
            return True
    return False
