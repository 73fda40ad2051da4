"""Turns samples into token ids and what is learnt of them, by the fastest way that gives the same as `chat.encode`.

Chats are rendered by a template that is compiled once (rendering.py), texts tokenised by tiktoken (bytelevel.py); where one
of the two cannot promise the same, for a tokenizer or for a sample, the slow way takes its place.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.tokenization import loss_mask, reference
from jobs.tokenization.byte_bpe import ByteLevel
from jobs.tokenization.chat_template import ends, template_text
from jobs.tokenization.conversation import Sample
from jobs.tokenization.offsets import Found, Span, Text, Unfit, mark, whole
from jobs.tokenization.template_renderer import Rendering

Encoded = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""(token ids, 1 where learnt)."""
UNLEARNT = np.zeros(1, dtype=np.uint8)


class Tokens(Protocol):
    """A fast way from texts to tokens."""

    name: str

    def __call__(self, texts: Sequence[Text]) -> list[Found | None]:
        """None for a text that it cannot promise to do alike."""


class Encoder:
    """Samples to token ids and what is learnt of them, by the fastest way that gives the same as the slow one.

    template, mask: as for `chat.encode`. fast: whether to take a fast way where there is one.
    """

    ways: str
    """How, in one short sentence for the log."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        mask: str = "assistant",
        fast: bool = True,
    ) -> None:
        loss_mask.check_mask(mask)
        self._slow = partial(reference.encode, tokenizer=tokenizer, template=template, mask=mask)
        self._tokenizer, self._template, self._mask = tokenizer, template, mask
        self._ends = ends(tokenizer)
        self._bos, self._eos = tokenizer.bos_token, tokenizer.eos_token_id
        self._end = np.array([self._eos or 0], dtype=np.int32)
        self._renderers: dict[bool, loss_mask.Renderer] = {}
        self._tokens: Tokens | None = None
        self.ways = "tokens and chats by transformers"
        if not fast:
            return
        self._tokens, why = _tokens(tokenizer)
        self.ways = f"tokens by {self._tokens.name if self._tokens else 'transformers'}{why}"
        if template is not None or tokenizer.chat_template:
            direct = isinstance(self._renderer(False), Rendering)
            self.ways += f", chats rendered {'directly' if direct else 'by transformers'}"

    def __call__(self, sample: Sample) -> Encoded:
        """Raises ValueError, as `chat.encode` does, with a sentence that names the cause and the remedy."""
        return self.fast([sample])[0] or self.slow(sample)

    def slow(self, sample: Sample) -> Encoded:
        """As `__call__`, for a sample that the fast way leaves."""
        ids, trained = self._slow(sample)
        return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.uint8)

    def fast(self, samples: Sequence[Sample]) -> list[Encoded | None]:
        """Many at once, which is sooner done than one by one; None for those that only the slow way can do."""
        found: list[Encoded | None] = [None if sample.ids is None else _finished(sample) for sample in samples]
        if self._tokens is None:
            return found
        texts = {number: text for number, sample in enumerate(samples) if (text := self._text(sample))}
        for number, made in zip(texts, self._tokens([*texts.values()]), strict=True):
            if made is not None:
                found[number] = self._ended(samples[number], made) if samples[number].parts else made[:2]
        return found

    def _text(self, sample: Sample) -> Text | None:
        """What is to be tokenised; None where the slow way must say what is wrong with the sample, or that nothing is."""
        with suppress(Exception):
            if sample.turns and not sample.parts:
                text, spans, cut = loss_mask.learnt(
                    sample, self._renderer(sample.tools is not None), self._mask, self._ends
                )
                return Text(text, spans, cut, False)
            if sample.parts and self._eos is not None:
                text, spans = loss_mask.joined(sample.parts, self._mask)
                return Text(text, spans, [], not (self._bos and text.startswith(self._bos)))
        return None

    def _ended(self, sample: Sample, found: Found) -> Encoded:
        """As `chat.encode` ends a text: with the end-of-text token once."""
        ids, trained, unwritten = found
        if not len(ids) or ids[-1] != self._eos:
            ids, trained = np.concatenate((ids, self._end)), np.concatenate((trained, UNLEARNT))
            unwritten = True
        if unwritten:
            trained[-1] = sample.parts[-1][1] or self._mask == "all"
        return ids, trained

    def _renderer(self, tools: bool) -> loss_mask.Renderer:
        """The chat template at work; a tokenizer may have another one for samples with tools."""
        if tools not in self._renderers:
            source = template_text(self._template, self._tokenizer, [] if tools else None)
            try:
                self._renderers[tools] = Rendering(source, self._tokenizer.special_tokens_map)
            except Unfit:
                self._renderers[tools] = reference.Transformers(self._tokenizer, source)
        return self._renderers[tools]


class Direct:
    """Texts to tokens without the layers of transformers between: for every fast tokenizer."""

    name = "tokenizers"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            raise Unfit("the tokenizer has a way of its own")
        tokenizer(
            "", add_special_tokens=False
        )  # takes padding and truncation, which a file may ask for, out of the backend
        self._tokenizer, self._encode = tokenizer, tokenizer.backend_tokenizer.encode

    def __call__(self, texts: Sequence[Text]) -> list[Found | None]:
        found: list[Found | None] = [None] * len(texts)
        for number, text in enumerate(texts):
            with suppress(Exception):
                found[number] = self._one(*text)
        return found

    def _one(self, text: str, spans: list[Span], cut: list[Span], special: bool) -> Found:
        found = self._encode(text, add_special_tokens=special)
        ids = found.ids
        bounds = whole(ids, found.offsets, text, self._tokenizer)
        trained = mark(bounds, cut, mark(bounds, spans, [0] * len(ids)), value=0)
        unwritten = bounds[-1:] == [(len(text), len(text))]
        return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.uint8), unwritten


def _tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens | None, str]:
    """(the fastest way for this tokenizer, why it is none of the faster ones); found once, for it takes half a second."""
    return _found(tokenizer, len(tokenizer))


@lru_cache(maxsize=2)
def _found(tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[Tokens | None, str]:
    why = ""
    for way in (ByteLevel, Direct):
        try:
            return way(tokenizer), why
        except Exception as error:  # Unfit, or what a library says of a file unlike those it knows: the next way may do
            why = f" ({error})"
    return None, why


def _finished(sample: Sample) -> Encoded:
    ids = np.array(sample.ids, dtype=np.int32)
    labels = np.array(sample.labels or sample.ids)
    return ids, (labels != -100).astype(np.uint8)


def same(
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[Sample],
    *,
    template: str | None = None,
    mask: str = "assistant",
) -> str | None:
    """None where the fast way gives what `chat.encode` gives on these samples, or where there is none; else what differs first."""
    samples = list(samples)
    fast = Encoder(tokenizer, template=template, mask=mask)
    slow = Encoder(tokenizer, template=template, mask=mask, fast=False)
    for number, (sample, found) in enumerate(zip(samples, fast.fast(samples), strict=True)):
        if found and (difference := _difference(found, _attempt(slow, sample))):
            return f"sample {number}: {difference}"
    return None


def _attempt(encoder: Encoder, sample: Sample) -> Encoded | str:
    try:
        return encoder(sample)
    except ValueError as error:
        return str(error)


def _difference(fast: Encoded, slow: Encoded | str) -> str | None:
    if isinstance(slow, str):
        return f"{len(fast[0])} tokens, but should be: {slow}"
    for what, found, expected in zip(("ids", "learnt"), fast, slow, strict=True):
        if len(found) != len(expected):
            return f"{len(found)} {what}, but should be {len(expected)}"
        if len(unlike := np.flatnonzero(found != expected)):
            at = unlike[0]
            return f"{what}[{at}] is {found[at]}, but should be {expected[at]}"
    return None
