"""Encodes a sample with transformers alone: the slow way, whose result every fast way must reproduce.

The text is rendered once and tokenized once, so the ids are those of `tokenizer.apply_chat_template`, and of inference.
A token is trained on if it holds at least one character to train on.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.tokenization.chat_settings import DEFAULTS, ChatSettings
from jobs.tokenization.chat_template import end_token_ids, span_tokens, template_source
from jobs.tokenization.conversation import Sample
from jobs.tokenization.loss_mask import GENERATION_TAG, join_parts, trained_spans
from jobs.tokenization.offsets import Span, mark_tokens, tokenize_with_spans


def encode(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    settings: ChatSettings = DEFAULTS,
) -> tuple[list[int], list[int]]:
    """Returns (token ids, 1 for each token to train on). Raises ValueError with the cause and the remedy.

    template: None is the tokenizer's own, else a name of `conf.chat_templates.BUNDLED` or a file. A sample of token ids keeps its
    labels.
    """
    if sample.ids is not None:
        return list(sample.ids), [int(label != -100) for label in sample.labels or sample.ids]
    if sample.parts:
        return _encode_text(sample.parts, tokenizer, settings.mask)
    source = template_source(template, tokenizer, sample.tools)
    renderer = TransformersRenderer(tokenizer, source, settings.template_kwargs)
    text, spans, excluded = trained_spans(sample, renderer, settings, span_tokens(tokenizer, settings.end_of_turn))
    ids, token_spans = tokenize_with_spans(text, tokenizer, add_special_tokens=False)
    trained = mark_tokens(token_spans, spans, [0] * len(ids))
    return ids, mark_tokens(token_spans, excluded, trained, value=0)


def chat_messages(sample: Sample) -> list[dict[str, Any]]:
    """The turns as messages for `apply_chat_template`, without the keys that have no value."""
    return [turn.message() for turn in sample.turns]


def ends_with_end_token(
    ids: Sequence[int] | NDArray[np.integer],
    trained: Sequence[int] | NDArray[np.integer],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Set[int] | None = None,
) -> bool:
    """Whether the last trained token, not counting whitespace, ends a turn or the text.

    A model that is never trained on such a token never stops generating. end_ids: the result of
    `chat_template.end_token_ids`, to compute it only once for many samples.
    """
    end_ids = end_token_ids(tokenizer) if end_ids is None else end_ids
    for position in np.asarray(trained).nonzero()[0][::-1]:
        token = int(ids[position])
        if token in end_ids:
            return True
        if not str(tokenizer.decode([token])).isspace():
            return False
    return False


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, so the model would never learn to stop: set data.eos_token"
        )
    return int(tokenizer.eos_token_id)


def _encode_text(
    parts: tuple[tuple[str, bool], ...], tokenizer: PreTrainedTokenizerBase, mask: str
) -> tuple[list[int], list[int]]:
    """Encode plain text: the tokenizer's beginning-of-text token once, and the end-of-text token once."""
    text, spans = join_parts(parts, mask)
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids, token_spans = tokenize_with_spans(text, tokenizer, add_special_tokens=not has_bos)
    trained = mark_tokens(token_spans, spans, [0] * len(ids))
    eos = _eos_id(tokenizer)
    end = (len(text), len(text))
    if ids[-1:] != [eos]:
        ids, trained, token_spans = [*ids, eos], [*trained, 0], [*token_spans, end]
    if token_spans[-1] == end:  # The end-of-text token is not written in the text: it belongs to the last part.
        trained[-1] = int(parts[-1][1] or mask == "all")
    return ids, trained


class TransformersRenderer:
    """Renders with transformers. Every other renderer must give the same text and marks."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.source, self.has_marks = tokenizer, source, bool(GENERATION_TAG.search(source))
        self.template_kwargs = dict(template_kwargs or {})

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        texts, marks = self._render(chat_messages(sample), sample, return_assistant_tokens_mask=self.has_marks)
        return texts[0], list(marks[0]) if self.has_marks else []

    def render_prefix(self, sample: Sample, turns: int, generation_prompt: bool) -> str:
        return self._render(chat_messages(sample)[:turns], sample, add_generation_prompt=generation_prompt)[0][0]

    def _render(
        self, messages: list[dict[str, Any]], sample: Sample, **options: Any
    ) -> tuple[list[str], list[list[Span]]]:
        """What `apply_chat_template` calls. That function also leaves out keys with null, for which some templates test."""
        variables = {**self.tokenizer.special_tokens_map, **self._variables(sample)}
        try:
            return cast(
                "tuple[list[str], list[list[Span]]]",  # transformers 5 declares `str`
                render_jinja_template([messages], chat_template=self.source, **options, **variables),
            )
        except (TemplateError, TypeError) as error:
            raise _refused(error) from error

    def _variables(self, sample: Sample) -> dict[str, Any]:
        """What the template gets beside the turns. The row's own variables win over the config's."""
        return {
            "tools": sample.tools,
            "documents": sample.documents,
            **self.template_kwargs,
            **(sample.template_kwargs or {}),
        }


def _refused(error: Exception) -> ValueError:
    return ValueError(f"the chat template refuses the turns: {error}")
