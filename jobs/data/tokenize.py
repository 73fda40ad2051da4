"""One block of raw rows to tokens, and what the gates find in it: the work of every process of preprocess."""

import gc
import hashlib
import os
import threading
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from conf.choices import Mask, Overlong
from jobs.data import formats, quality_gates
from jobs.data.quality_gates import Findings
from jobs.data.sources import Block, Row, Unreadable
from jobs.tokenization import chat_template, reference
from jobs.tokenization.conversation import Sample
from jobs.tokenization.encoder import Encoder

UNEXPECTED = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""What a row's values can raise where nobody has thought of them."""


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


@dataclass(frozen=True)
class Tokenised:
    """The samples of a block, one after the other; arrays, because thousands of small ones take long between processes."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    """Of each token."""
    lengths: NDArray[np.int64]
    """Of each sample, in tokens."""
    labels: NDArray[np.int32]
    """Trained tokens of each sample, but for its first: nothing predicts that one."""
    hashes: NDArray[np.uint64]
    """Of a sample's tokens and mask."""
    origins: NDArray[np.uint64]
    """The hash of the first sample of the same row: parts of a long text are held out together."""
    places: NDArray[np.int64]
    """The number of its row in its file."""
    rows: int
    """Rows read, of which some may have been left out."""
    findings: Findings


class Tokeniser:
    """Makes tokens of blocks, as the recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        words = recipe.tokenizer
        self.recipe = recipe
        self.encode = Encoder(words, mask=recipe.mask.name, fast=recipe.fast)
        self.vocabulary = len(words)
        self.closing = chat_template.end_token_ids(words)

    def __call__(self, block: Block) -> Tokenised:
        findings, samples, places, firsts = Findings(), [], [], []
        rows = [(number, self._read(row)) for number, row in block.parsed()]
        encoded = iter(self.encode.encode_fast([sample for _, sample in rows if isinstance(sample, Sample)]))
        for number, sample in rows:
            place = f"{block.place}{number}"
            try:
                if isinstance(sample, Exception):
                    raise sample
                ids, trained = next(encoded) or self.encode.encode_slow(sample)
            except ValueError as error:
                findings.add(quality_gates.of_error(error), place, str(error))
                continue
            except UNEXPECTED as error:
                said = (
                    f"has a value of an unexpected kind ({type(error).__name__}: {error}): look at it, or drop the row"
                )
                findings.add("unusable", place, said)
                continue
            kept = self._fitted(sample, ids, trained, findings, place)
            firsts += [len(samples)] * len(kept)
            samples += kept
            places += [number] * len(kept)
        return _joined(samples, firsts, places, len(rows), findings)

    def _read(self, row: Row | Unreadable) -> Sample | Exception:
        """The row's sample, or what is wrong with it, to be told in its turn."""
        if isinstance(row, Unreadable):
            return row
        try:
            return formats.convert(row, self.recipe.shape, self.recipe.fields, self.recipe.roles)
        except (ValueError, *UNEXPECTED) as error:
            return error

    def _fitted(
        self, sample: Sample, ids: NDArray[np.int32], trained: NDArray[np.uint8], findings: Findings, place: str
    ) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """The row's samples that can be trained on; the gates count what they see."""
        if sample.ids is not None and (ids.min() < 0 or ids.max() >= self.vocabulary):
            strange = int(ids[(ids < 0) | (ids >= self.vocabulary)][0])
            findings.add("vocabulary", place, f"{strange} is not within the {self.vocabulary} tokens")
            return []
        if found := quality_gates.hole(sample):
            findings.add("placeholders", place, found)
        parts = [(ids, trained)]
        if len(ids) > self.recipe.max_length:
            parts = self._shortened(ids, trained, findings, place)
        elif _learnt(trained) and not reference.ends_with_end_token(ids, trained, self.recipe.tokenizer, self.closing):
            findings.add("endless", place, repr(self.recipe.tokenizer.decode(ids[-8:])))
        kept = [part for part in parts if _learnt(part[1][1:])]
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


def _joined(
    samples: list[tuple[NDArray[np.int32], NDArray[np.uint8]]],
    firsts: list[int],
    places: list[int],
    rows: int,
    findings: Findings,
) -> Tokenised:
    count = len(samples)
    trained = np.concatenate([np.zeros(0, dtype=np.uint8), *(mask for _, mask in samples)])
    lengths = np.fromiter((len(ids) for ids, _ in samples), dtype=np.int64, count=count)
    starts = np.cumsum(lengths) - lengths
    hashes = np.fromiter((_hash(*sample) for sample in samples), dtype=np.uint64, count=count)
    return Tokenised(
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *(ids for ids, _ in samples)]),
        trained=trained,
        lengths=lengths,
        labels=np.add.reduceat(trained, starts, dtype=np.int32) - trained[starts] if count else np.zeros(0, np.int32),
        hashes=hashes,
        origins=hashes[np.asarray(firsts, dtype=np.int64)],
        places=np.asarray(places, dtype=np.int64),
        rows=rows,
        findings=findings,
    )


def _learnt(trained: NDArray[np.uint8]) -> bool:
    return b"\1" in trained.tobytes()  # a fifth of the time of numpy's any


def _hash(ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> int:
    found = hashlib.blake2b(ids.tobytes(), digest_size=8)
    found.update(np.packbits(trained).tobytes())
    return int.from_bytes(found.digest(), "little")


_tokeniser: Tokeniser | None = None


def begin(recipe: Recipe) -> None:
    """Make this process a worker: it ends when its parent does, however that ends."""
    global _tokeniser
    _tokeniser = Tokeniser(recipe)
    gc.freeze()  # as in preprocess.run
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent: Any = parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)


def work(block: Block) -> Tokenised:
    assert _tokeniser is not None
    return _tokeniser(block)
