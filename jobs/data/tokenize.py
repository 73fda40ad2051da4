"""Tokenizes one block of raw rows and applies the quality gates to it: the work of each preprocess worker process."""

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

from conf.choices import Overlong
from jobs.data import formats, quality_gates
from jobs.data.file_readers import Unreadable
from jobs.data.quality_gates import Findings
from jobs.data.sources import Block, Row
from jobs.tokenization import chat_template, reference
from jobs.tokenization.chat_settings import ChatSettings
from jobs.tokenization.conversation import Sample
from jobs.tokenization.encoder import Encoder

UNEXPECTED = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""Errors that values of a strange type can raise in code that has no check for them; such a row counts as unusable."""

Tokens = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""Token ids of a sample, and 1 for each trained token."""


@dataclass(frozen=True)
class TokenizeSettings:
    """Everything that decides a row's tokens. The parent process makes it once, so that all workers do the same."""

    tokenizer: PreTrainedTokenizerBase
    format: str
    fields: dict[str, str]
    roles: dict[str, str]
    chat: ChatSettings
    max_length: int
    overlong: Overlong
    ignore: tuple[str, ...] = ()
    split_thinking: bool = False
    fast: bool = True
    """Whether the encoder may use its fast paths; the parent has compared them with the slow one."""

    def convert(self, row: Row) -> Sample:
        """The sample of one row. Raises ValueError if the row does not fit."""
        return formats.convert(row, self.format, self.fields, self.roles, self.ignore, self.split_thinking)


@dataclass(frozen=True)
class TokenizedBlock:
    """The samples of a block, concatenated: sending thousands of small arrays between processes would be slow."""

    tokens: NDArray[np.int32]
    """Shape (tokens,)."""
    trained: NDArray[np.uint8]
    """1 for each trained token: shape (tokens,)."""
    lengths: NDArray[np.int64]
    """Tokens of each sample: shape (samples,), like the arrays below."""
    labels: NDArray[np.int32]
    """Trained tokens of each sample, without its first token, because nothing predicts that one."""
    hashes: NDArray[np.uint64]
    """Hash of each sample's tokens and trained mask."""
    origins: NDArray[np.uint64]
    """For each sample, the hash of the first sample from the same row, so that parts of a split row are held out together."""
    row_numbers: NDArray[np.int64]
    """For each sample, the number of its row in the file."""
    rows: int
    """Rows that were read, including those that were left out."""
    findings: Findings


class BlockTokenizer:
    """Tokenizes blocks with the given settings."""

    def __init__(self, settings: TokenizeSettings) -> None:
        tokenizer = settings.tokenizer
        self.settings = settings
        self.encode = Encoder(tokenizer, settings=settings.chat, fast=settings.fast)
        self.vocabulary_size = len(tokenizer)
        self.end_ids = chat_template.end_token_ids(tokenizer, settings.chat.end_of_turn)

    def __call__(self, block: Block) -> TokenizedBlock:
        findings = Findings()
        samples: list[Tokens] = []
        row_numbers: list[int] = []
        first_of_row: list[int] = []  # for each sample, the index of the first sample from the same row
        rows = [(number, self._convert(row)) for number, row in block.parsed()]
        # The whole block is encoded at once, which is faster. None means: this sample needs the slow path.
        encoded = iter(self.encode.encode_fast([sample for _, sample in rows if isinstance(sample, Sample)]))
        for number, sample in rows:
            location = f"{block.location}{number}"
            try:
                if isinstance(sample, Exception):
                    raise sample
                ids, trained = next(encoded) or self.encode.encode_slow(sample)
                if unread := self.encode.unread(sample):
                    findings.add("unwritten", location, unread)
            except ValueError as error:
                findings.add(quality_gates.gate_of(error), location, str(error))
                continue
            except UNEXPECTED as error:
                message = (
                    f"has a value of an unexpected type ({type(error).__name__}: {error}): correct or drop the row"
                )
                findings.add("unusable", location, message)
                continue
            kept = self._usable_samples(sample, ids, trained, findings, location)
            first_of_row += [len(samples)] * len(kept)
            samples += kept
            row_numbers += [number] * len(kept)
        return _concatenate(samples, first_of_row, row_numbers, rows=len(rows), findings=findings)

    def _convert(self, row: Row | Unreadable) -> Sample | Exception:
        """The row's sample, or the error. It is returned, not raised, so that errors are counted in the order of the rows."""
        if isinstance(row, Unreadable):
            return row
        try:
            return self.settings.convert(row)
        except (ValueError, *UNEXPECTED) as error:
            return error

    def _usable_samples(
        self, sample: Sample, ids: NDArray[np.int32], trained: NDArray[np.uint8], findings: Findings, location: str
    ) -> list[Tokens]:
        """The samples of one row that can be trained on: none, one, or several if it is split. Counts what the gates find."""
        if sample.ids is not None and (ids.min() < 0 or ids.max() >= self.vocabulary_size):
            unknown = int(ids[(ids < 0) | (ids >= self.vocabulary_size)][0])
            findings.add(
                "vocabulary", location, f"token id {unknown} is not below the vocabulary size {self.vocabulary_size}"
            )
            return []
        if placeholder := quality_gates.find_placeholder(sample):
            findings.add("placeholders", location, placeholder)
        parts = []
        for piece in _packed_samples(ids, trained, sample.lengths):
            if len(piece[0]) > self.settings.max_length:
                parts += self._shorten(*piece, findings, location)
                continue
            parts.append(piece)
            if not self._ends(*piece):
                findings.add("endless", location, repr(self.settings.tokenizer.decode(piece[0][-8:])))
        kept = [part for part in parts if _any_trained(part[1][1:])]
        if parts and not kept:
            findings.add("untrained", location)
        return kept

    def _ends(self, ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> bool:
        """Whether the last trained token is an end token, or need not be one."""
        if self.settings.chat.train_on_end == "none" or not _any_trained(trained):
            return True
        return reference.ends_with_end_token(ids, trained, self.settings.tokenizer, self.end_ids)

    def _shorten(
        self, ids: NDArray[np.int32], trained: NDArray[np.uint8], findings: Findings, location: str
    ) -> list[Tokens]:
        """A sample over max_length, truncated, split or dropped as data.overlong says."""
        size, policy = self.settings.max_length, self.settings.overlong
        if policy is Overlong.error:
            message = f"{len(ids)} tokens are over data.max_length={size}; see data.overlong"
            findings.add("unusable", location, message)
            return []
        findings.add("overlong", location, f"{len(ids)} tokens")
        if policy is Overlong.split:
            return [(ids[start : start + size], trained[start : start + size]) for start in range(0, len(ids), size)]
        return [(ids[:size], trained[:size])] if policy is Overlong.truncate else []


def _concatenate(
    samples: list[Tokens], first_of_row: list[int], row_numbers: list[int], *, rows: int, findings: Findings
) -> TokenizedBlock:
    count = len(samples)
    trained = np.concatenate([np.zeros(0, dtype=np.uint8), *(mask for _, mask in samples)])
    lengths = np.fromiter((len(ids) for ids, _ in samples), dtype=np.int64, count=count)
    starts = np.cumsum(lengths) - lengths
    hashes = np.fromiter((_hash(*sample) for sample in samples), dtype=np.uint64, count=count)
    return TokenizedBlock(
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *(ids for ids, _ in samples)]),
        trained=trained,
        lengths=lengths,
        labels=np.add.reduceat(trained, starts, dtype=np.int32) - trained[starts] if count else np.zeros(0, np.int32),
        hashes=hashes,
        origins=hashes[np.asarray(first_of_row, dtype=np.int64)],
        row_numbers=np.asarray(row_numbers, dtype=np.int64),
        rows=rows,
        findings=findings,
    )


def _packed_samples(ids: NDArray[np.int32], trained: NDArray[np.uint8], lengths: tuple[int, ...]) -> list[Tokens]:
    """The samples of a row that holds several of these lengths; without lengths, the whole row."""
    if not lengths:
        return [(ids, trained)]
    borders = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, borders), np.split(trained, borders), strict=True))


def _any_trained(trained: NDArray[np.uint8]) -> bool:
    return b"\1" in trained.tobytes()  # five times as fast as numpy's any()


def _hash(ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> int:
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8)
    digest.update(np.packbits(trained).tobytes())
    return int.from_bytes(digest.digest(), "little")


_tokenizer: BlockTokenizer | None = None
"""The tokenizer of this worker process. `start_worker` sets it."""


def start_worker(settings: TokenizeSettings) -> None:
    """Initialize a worker process. It exits when its parent ends for any reason, so that a killed job leaves no workers."""
    global _tokenizer
    _tokenizer = BlockTokenizer(settings)
    gc.freeze()  # as in preprocess.run
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent: Any = parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)


def tokenize_block(block: Block) -> TokenizedBlock:
    """Tokenize one block in a worker process."""
    assert _tokenizer is not None
    return _tokenizer(block)
