"""Encodes samples into token ids and loss masks, by the fastest way that gives the same result as `reference.encode`.

Chats are rendered by a template compiled once (template_renderer.py), and texts are tokenized by tiktoken (byte_bpe.py). If one
of the two cannot guarantee the same result, for a tokenizer or for a sample, the slow way of transformers is used instead.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.tokenization import loss_mask, reference, template_inputs
from jobs.tokenization.byte_bpe import TiktokenBackend
from jobs.tokenization.chat_settings import DEFAULTS, ChatSettings
from jobs.tokenization.chat_template import span_tokens, template_source
from jobs.tokenization.conversation import Sample
from jobs.tokenization.offsets import (
    MaskedText,
    Span,
    TokenizedText,
    Unsupported,
    close_gaps,
    mark_tokens,
    panics_as_errors,
)
from jobs.tokenization.template_inputs import Renderer
from jobs.tokenization.template_renderer import CompiledRenderer

Encoded = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""(token ids, 1 for each token to train on), both (tokens,)."""
NOT_TRAINED = np.zeros(1, dtype=np.uint8)


class TokenizerBackend(Protocol):
    """A fast way to tokenize texts."""

    name: str

    def __call__(self, texts: Sequence[MaskedText]) -> list[TokenizedText | None]:
        """None for a text whose tokens it cannot guarantee."""


class Encoder:
    """Encodes samples by the fastest way that gives the same result as `reference.encode`.

    template, settings: as for `reference.encode`. fast: False uses transformers only.
    """

    description: str
    """Which libraries tokenize and render, in one short sentence for the log."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        settings: ChatSettings = DEFAULTS,
        fast: bool = True,
    ) -> None:
        self._reference = partial(reference.encode, tokenizer=tokenizer, template=template, settings=settings)
        self._tokenizer, self._template, self._settings = tokenizer, template, settings
        self._span_tokens = span_tokens(tokenizer, settings.end_of_turn)
        self._bos, self._eos = tokenizer.bos_token, tokenizer.eos_token_id
        self._eos_array = np.array([self._eos or 0], dtype=np.int32)
        self._renderers: dict[bool, Renderer] = {}
        self._backend: TokenizerBackend | None = None
        self.description = "tokens and chats by transformers"
        if not fast:
            return
        self._backend, reason = _fastest_backend(tokenizer, len(tokenizer))
        self.description = f"tokens by {self._backend.name if self._backend else 'transformers'}{reason}"
        if template is not None or tokenizer.chat_template:
            compiled = isinstance(self._renderer(False), CompiledRenderer)
            self.description += f", chats rendered {'directly' if compiled else 'by transformers'}"

    def __call__(self, sample: Sample) -> Encoded:
        """Encode one sample. Raises ValueError with the cause and the remedy, as `reference.encode` does."""
        return self.encode_fast([sample])[0] or self.encode_slow(sample)

    def encode_slow(self, sample: Sample) -> Encoded:
        """Encode one sample with transformers, for a sample that `encode_fast` cannot do."""
        ids, trained = self._reference(sample)
        return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.uint8)

    def encode_fast(self, samples: Sequence[Sample]) -> list[Encoded | None]:
        """Encode many samples at once, which is faster than one by one. None for a sample that needs `encode_slow`."""
        results: list[Encoded | None] = [None if sample.ids is None else _from_ids(sample) for sample in samples]
        if self._backend is None:
            return results
        texts = {number: text for number, sample in enumerate(samples) if (text := self._text(sample))}
        for number, tokenized in zip(texts, self._backend([*texts.values()]), strict=True):
            if tokenized is not None:
                is_text = bool(samples[number].parts)
                results[number] = self._append_eos(samples[number], tokenized) if is_text else tokenized[:2]
        return results

    def unread(self, sample: Sample) -> str | None:
        """What the row has that the template does not write; see `template_inputs.unread`. For a sample that can be encoded."""
        with_tools = sample.tools is not None
        try:
            return template_inputs.unread(sample, self._renderer(with_tools)) if sample.turns else None
        except Unsupported:
            return template_inputs.unread(sample, self._slow_renderer(with_tools))

    def _text(self, sample: Sample) -> MaskedText | None:
        """The text to tokenize. None if the slow way must report what is wrong with the sample, or find that nothing is."""
        with suppress(Exception):
            if sample.turns and not sample.parts:
                renderer = self._renderer(sample.tools is not None)
                text, spans, excluded = loss_mask.trained_spans(sample, renderer, self._settings, self._span_tokens)
                return MaskedText(text, spans, excluded, add_special_tokens=False)
            if sample.parts and self._eos is not None:
                text, spans = loss_mask.join_parts(sample.parts, self._settings.mask)
                has_bos = bool(self._bos and text.startswith(self._bos))
                return MaskedText(text, spans, [], add_special_tokens=not has_bos)
        return None

    def _append_eos(self, sample: Sample, tokenized: TokenizedText) -> Encoded:
        """End a text with the end-of-text token once, as `reference.encode` does."""
        ids, trained, last_is_added = tokenized
        if not len(ids) or ids[-1] != self._eos:
            ids, trained = np.concatenate((ids, self._eos_array)), np.concatenate((trained, NOT_TRAINED))
            last_is_added = True
        if last_is_added:
            trained[-1] = sample.parts[-1][1] or self._settings.mask == "all"
        return ids, trained

    def _renderer(self, with_tools: bool) -> Renderer:
        """The renderer of the chat template. A tokenizer may have another template for samples with tools."""
        if with_tools not in self._renderers:
            source = template_source(self._template, self._tokenizer, [] if with_tools else None)
            try:
                variables = {**self._tokenizer.special_tokens_map, **self._settings.template_kwargs}
                self._renderers[with_tools] = _compiled(source, json.dumps(variables))
            except Unsupported:
                self._renderers[with_tools] = self._slow_renderer(with_tools)
        return self._renderers[with_tools]

    def _slow_renderer(self, with_tools: bool) -> Renderer:
        source = template_source(self._template, self._tokenizer, [] if with_tools else None)
        return reference.TransformersRenderer(self._tokenizer, source, self._settings.template_kwargs)


class TokenizersBackend:
    """Tokenizes texts with the Rust tokenizer alone, without the Python layers of transformers. For every fast tokenizer."""

    name = "tokenizers"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            raise Unsupported("the tokenizer has its own encoding method")
        # A call turns off padding and truncation in the backend, which a tokenizer.json may ask for.
        tokenizer("", add_special_tokens=False)
        self._tokenizer, self._encode = tokenizer, tokenizer.backend_tokenizer.encode

    def __call__(self, texts: Sequence[MaskedText]) -> list[TokenizedText | None]:
        results: list[TokenizedText | None] = [None] * len(texts)
        for number, text in enumerate(texts):
            with suppress(Exception):
                results[number] = self._tokenize(*text)
        return results

    def _tokenize(
        self, text: str, trained_spans: list[Span], excluded_spans: list[Span], add_special_tokens: bool
    ) -> TokenizedText:
        with panics_as_errors(text):
            encoding = self._encode(text, add_special_tokens=add_special_tokens)
        ids = encoding.ids
        token_spans = close_gaps(ids, encoding.offsets, text, self._tokenizer)
        trained = mark_tokens(token_spans, trained_spans, [0] * len(ids))
        trained = mark_tokens(token_spans, excluded_spans, trained, value=0)
        last_is_added = token_spans[-1:] == [(len(text), len(text))]
        return TokenizedText(np.array(ids, dtype=np.int32), np.array(trained, dtype=np.uint8), last_is_added)


@lru_cache(maxsize=8)
def _compiled(source: str, variables: str) -> CompiledRenderer:
    """A renderer, compiled once for all encoders. variables: as JSON text, because a dict cannot be a key of the cache."""
    return CompiledRenderer(source, json.loads(variables))


@lru_cache(maxsize=2)
def _fastest_backend(tokenizer: PreTrainedTokenizerBase, _size: int) -> tuple[TokenizerBackend | None, str]:
    """(the fastest backend for this tokenizer, why a faster one cannot be used). Cached: it takes half a second.

    _size: number of tokens. It is part of the cache key because tokens may be added later.
    """
    reason = ""
    for backend in (TiktokenBackend, TokenizersBackend):
        try:
            return backend(tokenizer), reason
        except Exception as error:  # Unsupported, or any error of a library about an unusual file: try the next one
            reason = f" ({error})"
    return None, reason


def _from_ids(sample: Sample) -> Encoded:
    ids = np.array(sample.ids, dtype=np.int32)
    labels = np.array(sample.labels or sample.ids)
    return ids, (labels != -100).astype(np.uint8)


def first_difference(
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[Sample],
    *,
    template: str | None = None,
    settings: ChatSettings = DEFAULTS,
) -> str | None:
    """Compare the fast way with `reference.encode` on these samples. Returns the first difference, or None if there is none."""
    samples = list(samples)
    fast = Encoder(tokenizer, template=template, settings=settings)
    slow = Encoder(tokenizer, template=template, settings=settings, fast=False)
    for number, (sample, encoded) in enumerate(zip(samples, fast.encode_fast(samples), strict=True)):
        if encoded and (difference := _difference(encoded, _encode_or_error(slow, sample))):
            return f"sample {number}: {difference}"
    return None


def _encode_or_error(encoder: Encoder, sample: Sample) -> Encoded | str:
    try:
        return encoder(sample)
    except ValueError as error:
        return str(error)


def _difference(fast: Encoded, slow: Encoded | str) -> str | None:
    if isinstance(slow, str):
        return f"{len(fast[0])} tokens instead of the error: {slow}"
    pairs: tuple[tuple[str, NDArray[np.integer], NDArray[np.integer]], ...]
    pairs = (("ids", fast[0], slow[0]), ("trained", fast[1], slow[1]))
    for name, actual, expected in pairs:
        if len(actual) != len(expected):
            return f"{len(actual)} {name} instead of {len(expected)}"
        if len(unequal := np.flatnonzero(actual != expected)):
            at = unequal[0]
            return f"{name}[{at}] is {actual[at]} instead of {expected[at]}"
    return None
