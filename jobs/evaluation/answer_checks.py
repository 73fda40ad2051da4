"""Finds faults of a generated answer that need no understanding: an empty text, a loop, a broken template, no end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from jobs.tokenization import chat_template
from jobs.tokenization.tokenizer import special_token_ids

FAULTS = {
    "empty": "are empty",
    "looping": "end in a loop",
    "repeats": "repeat the question",
    "template": "have tokens of the chat template inside",
    "endless": "had not ended after generate.max_new_tokens",
}
"""Every fault, worded to follow a number of answers."""
MAX_PERIOD, MIN_REPEATS, MIN_TOKENS = 64, 3, 24
"""A loop: its n-gram has at most MAX_PERIOD tokens, repeats at least MIN_REPEATS times, and covers at least MIN_TOKENS tokens."""
MIN_WORDS = 4
"""A shorter question may well be part of its answer."""
MARKERS = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
"""How chat templates write the beginning and end of a turn."""


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens of a tokenizer and its chat template that an answer may have only at its end."""

    ids: frozenset[int]
    end_ids: frozenset[int]
    """Those that end an answer."""
    markers: tuple[str, ...]
    """What the template writes around turns, also if it is made of ordinary tokens."""


def special_tokens(tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[str] = ()) -> SpecialTokens:
    """The special tokens of a tokenizer and the turn markers of its chat template. end_of_turn: the value of that key of `data`."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return SpecialTokens(
        ids=special_token_ids(tokenizer),
        end_ids=chat_template.end_token_ids(tokenizer, end_of_turn),
        markers=tuple(sorted(set(MARKERS.findall(template)))),
    )


def find_faults(ids: Sequence[int], text: str, special: SpecialTokens, question: str = "") -> list[str]:
    """Names of the FAULTS that an answer has.

    ids: its tokens, including the end token if there is one. text: its text without special tokens.

    empty      the text is empty or whitespace
    looping    its last tokens repeat, see `ends_in_loop`
    repeats    it contains the whole question, which has at least MIN_WORDS words
    template   a special token comes before the end, or the text contains a turn marker of the chat template
    endless    its last token does not end a turn
    """
    ended = has_ended(ids, special)
    body = list(ids[:-1] if ended else ids)
    checks = {
        "empty": not text.strip(),
        "looping": ends_in_loop(body),
        "repeats": repeats(text, question),
        "template": any(token in special.ids for token in body) or any(marker in text for marker in special.markers),
        "endless": not ended,
    }
    return [name for name, present in checks.items() if present]


def repeats(text: str, question: str) -> bool:
    """Whether an answer contains its question, in any case and with any blanks."""
    words = question.casefold().split()
    return len(words) >= MIN_WORDS and " ".join(words) in " ".join(text.casefold().split())


def has_ended(ids: Sequence[int], special: SpecialTokens) -> bool:
    """Whether the last token ends an answer."""
    return bool(ids) and ids[-1] in special.end_ids


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the tokens end in an n-gram that repeats.

    True if, for some n of 1 to MAX_PERIOD, each of the last max(MIN_REPEATS * n, MIN_TOKENS) tokens equals the token n before
    it. So the first repeat may be cut off at its beginning.
    """
    for period in range(1, MAX_PERIOD + 1):
        length = max(MIN_REPEATS * period, MIN_TOKENS)
        if length > len(ids):
            return False
        tail = ids[len(ids) - length :]
        if all(tail[index] == tail[index - period] for index in range(period, length)):
            return True
    return False
