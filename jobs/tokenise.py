"""One block of raw rows to tokens, and what the gates find in it: the work of every process of preprocess."""

import hashlib
import os
import threading
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from conf.schema import Mask, Overlong
from jobs import formats, gates
from jobs.encode import Encoder
from jobs.gates import Findings
from jobs.sources import Block, Unreadable
from jobs.templates import ends
from jobs.turns import Sample


@dataclass(frozen=True)
class Recipe:
    """All that makes tokens of a row: what the parent decided, so that every process does the same."""

    tokenizer: PreTrainedTokenizerBase
    shape: str
    fields: dict[str, str]
    roles: dict[str, str]
    mask: Mask
    max_length: int
    overlong: Overlong
    fast: bool = True
    """Whether the encoder may take its fast ways; the parent has compared them with the slow one."""


@dataclass
class Tokenised:
    """The samples of some rows, one after the other; arrays of one number a token, or one a sample."""

    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    trained: list[NDArray[np.uint8]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    """Of a sample's tokens and mask, 64 bits."""
    places: list[int] = field(default_factory=list)
    """The number of its row in its file."""
    findings: Findings = field(default_factory=Findings)
    rows: int = 0
    """Rows read, of which some may have been left out."""


class Tokeniser:
    """Makes tokens of blocks, as the recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        words = recipe.tokenizer
        self.recipe = recipe
        self.encode = Encoder(words, mask=recipe.mask.name, fast=recipe.fast)
        self.vocabulary = len(words)
        self.ends = {words.convert_tokens_to_ids(end) for end in ends(words)}

    def __call__(self, block: Block) -> Tokenised:
        done = Tokenised()
        for number, row in block.parsed():
            done.rows += 1
            place = f"{block.place}{number}"
            try:
                if isinstance(row, Unreadable):
                    raise row
                sample = formats.convert(row, self.recipe.shape, self.recipe.fields, self.recipe.roles)
                ids, trained = self.encode(sample)
            except ValueError as error:
                done.findings.add(gates.of_error(error), place, str(error))
                continue
            for tokens, mask in self._fitted(sample, ids, trained, done.findings, place):
                done.tokens.append(tokens)
                done.trained.append(mask)
                done.hashes.append(_hash(tokens, mask))
                done.places.append(number)
        return done

    def _fitted(
        self, sample: Sample, ids: NDArray[np.int32], trained: NDArray[np.uint8], findings: Findings, place: str
    ) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """The row's samples that can be trained on; the gates count what they see."""
        if sample.ids is not None and (ids.min() < 0 or ids.max() >= self.vocabulary):
            strange = int(ids[(ids < 0) | (ids >= self.vocabulary)][0])
            findings.add("vocabulary", place, f"{strange} is not within the {self.vocabulary} tokens")
            return []
        if found := gates.hole(sample):
            findings.add("placeholders", place, found)
        parts = [(ids, trained)]
        if len(ids) > self.recipe.max_length:
            parts = self._shortened(ids, trained, findings, place)
        elif trained.any() and not self._ends(ids, trained):
            findings.add("endless", place, repr(self.recipe.tokenizer.decode(ids[-8:])))
        kept = [part for part in parts if part[1][1:].any()]
        if parts and not kept:
            findings.add("untrained", place)
        return kept

    def _shortened(
        self, ids: NDArray[np.int32], trained: NDArray[np.uint8], findings: Findings, place: str
    ) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        size, policy = self.recipe.max_length, self.recipe.overlong
        if policy is Overlong.error:
            findings.add("unusable", place, f"{len(ids)} tokens are over data.max_length={size}; see data.overlong")
            return []
        findings.add("overlong", place, f"{len(ids)} tokens")
        if policy is Overlong.split:
            return [(ids[at : at + size], trained[at : at + size]) for at in range(0, len(ids), size)]
        return [(ids[:size], trained[:size])] if policy is Overlong.truncate else []

    def _ends(self, ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> bool:
        """Whether the last trained token, blanks aside, ends a turn or the text."""
        for token in ids[np.flatnonzero(trained)][::-1].tolist():
            if token in self.ends:
                return True
            if not self.recipe.tokenizer.decode([token]).isspace():
                return False
        return False


def _hash(ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> int:
    found = hashlib.blake2b(ids.tobytes(), digest_size=8)
    found.update(np.packbits(trained).tobytes())
    return int.from_bytes(found.digest(), "little")


_tokeniser: Tokeniser | None = None


def begin(recipe: Recipe) -> None:
    """Make this process a worker: it ends when its parent does, however that ends."""
    global _tokeniser
    _tokeniser = Tokeniser(recipe)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent: Any = parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)


def work(block: Block) -> Tokenised:
    assert _tokeniser is not None
    return _tokeniser(block)
