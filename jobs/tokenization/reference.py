"""Encodes a sample with transformers alone: the slow way, whose result every fast way must reproduce.

The text is rendered once and tokenized once, so the ids are those of `tokenizer.apply_chat_template`, and of inference.
A token is trained on if it holds at least one character to train on.
"""

from collections.abc import Sequence, Set
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.tokenization.chat_template import end_token_ids, span_tokens, template_source
from jobs.tokenization.conversation import Sample
from jobs.tokenization.loss_mask import GENERATION_TAG, check_mask, join_parts, trained_spans
from jobs.tokenization.offsets import Span, mark_tokens, tokenize_with_spans


def encode(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, template: str | None = None, mask: str = "assistant"
) -> tuple[list[int], list[int]]:
    """Returns (token ids, 1 for each token to train on). Raises ValueError with the cause and the remedy.

    template: None is the tokenizer's own, else a name of `chat_template.BUNDLED` or a file. mask: `assistant` trains on all
    assistant turns, `last` on the last one, `all` on the whole text. A turn's own `train` flag wins. A sample of token ids
    keeps its labels.
    """
    check_mask(mask)
    if sample.ids is not None:
        return list(sample.ids), [int(label != -100) for label in sample.labels or sample.ids]
    if sample.parts:
        return _encode_text(sample.parts, tokenizer, mask)
    renderer = TransformersRenderer(tokenizer, template_source(template, tokenizer, sample.tools))
    text, spans, excluded = trained_spans(sample, renderer, mask, span_tokens(tokenizer))
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
    """Renders with `apply_chat_template` of transformers. Every other renderer must give the same text and marks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer, self.source, self.has_marks = tokenizer, source, bool(GENERATION_TAG.search(source))

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        if not self.has_marks:
            return self.render_prefix(sample, len(sample.turns), False), []
        special_tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        tools = cast("list[Any] | None", sample.tools)  # transformers also takes functions; its type is invariant
        try:
            texts, marks = cast(
                "tuple[list[str], list[list[Span]]]",  # transformers 5 declares `str`
                render_jinja_template(
                    [chat_messages(sample)],
                    tools=tools,
                    chat_template=self.source,
                    return_assistant_tokens_mask=True,
                    **special_tokens,
                ),
            )
        except (TemplateError, TypeError) as error:
            raise _refused(error) from error
        return texts[0], list(marks[0])

    def render_prefix(self, sample: Sample, turns: int, generation_prompt: bool) -> str:
        tools = cast("list[Any] | None", sample.tools)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_messages(sample)[:turns],
                    tools=tools,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except (TemplateError, TypeError) as error:
            raise _refused(error) from error


def _refused(error: Exception) -> ValueError:
    return ValueError(f"the chat template refuses the turns: {error}")
