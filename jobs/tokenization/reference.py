"""Turns a sample into token ids and the mask of what is learnt, with the bounds that the chat template itself gives.

The text is rendered once and tokenised once, so the ids are those of `tokenizer.apply_chat_template`, and of inference.
A learnt stretch of text becomes the tokens that hold any of its characters.
"""

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.tokenization.chat_template import ends, template_text
from jobs.tokenization.conversation import Sample
from jobs.tokenization.loss_mask import MARK, check_mask, joined, learnt
from jobs.tokenization.offsets import Span, mark, tokenise


def encode(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, template: str | None = None, mask: str = "assistant"
) -> tuple[list[int], list[int]]:
    """(token ids, 1 where learnt) of a sample. Raises ValueError with a sentence that names the cause and the remedy.

    template: None is the tokenizer's own, else a name of `NAMED` or a file. mask: `assistant` learns every assistant
    turn, `last` the last one, `all` the whole text; a turn's own `train` wins over it. Finished tokens keep their labels.
    """
    check_mask(mask)
    if sample.ids is not None:
        return list(sample.ids), [int(label != -100) for label in sample.labels or sample.ids]
    if sample.parts:
        return _encode_text(sample.parts, tokenizer, mask)
    renderer = Transformers(tokenizer, template_text(template, tokenizer, sample.tools))
    text, spans, cut = learnt(sample, renderer, mask, ends(tokenizer))
    ids, bounds = tokenise(text, tokenizer, add_special_tokens=False)
    trained = mark(bounds, spans, [0] * len(ids))
    return ids, mark(bounds, cut, trained, value=0)


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The turns as `apply_chat_template` wants them: without the keys that have no value."""
    return [
        {key: value for key, value in vars(turn).items() if value is not None and key != "train"}
        for turn in sample.turns
    ]


def ends_well(
    ids: Sequence[int], trained: Sequence[int], tokenizer: PreTrainedTokenizerBase, closing: Set[int] | None = None
) -> bool:
    """Whether the last learnt token, blanks aside, ends a turn or the text: a model that never sees one never stops.

    closing: what `end_ids` says, where many samples are looked at.
    """
    closing = end_ids(tokenizer) if closing is None else closing
    for place in np.asarray(trained).nonzero()[0][::-1]:
        token = int(ids[place])
        if token in closing:
            return True
        if not tokenizer.decode([token]).isspace():
            return False
    return False


def end_ids(tokenizer: PreTrainedTokenizerBase) -> Set[int]:
    """The tokens that end a turn or the text."""
    return {tokenizer.convert_tokens_to_ids(end) for end in ends(tokenizer)}


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so a model would never stop: set its eos_token")
    return tokenizer.eos_token_id


def _encode_text(
    parts: tuple[tuple[str, bool], ...], tokenizer: PreTrainedTokenizerBase, mask: str
) -> tuple[list[int], list[int]]:
    """Plain text with the tokenizer's own beginning, and the end-of-text token once."""
    text, spans = joined(parts, mask)
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids, bounds = tokenise(text, tokenizer, add_special_tokens=not begun)
    trained = mark(bounds, spans, [0] * len(ids))
    eos = eos_of(tokenizer)
    if ids[-1:] != [eos]:
        ids, trained, bounds = [*ids, eos], [*trained, 0], [*bounds, (len(text), len(text))]
    if bounds[-1] == (len(text), len(text)):  # not written in the text, so it belongs to the last part
        trained[-1] = int(parts[-1][1] or mask == "all")
    return ids, trained


class Transformers:
    """The renderer of `apply_chat_template`, which other renderers are held to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer, self.source, self.marked = tokenizer, source, bool(MARK.search(source))

    def whole(self, sample: Sample) -> tuple[str, list[Span]]:
        if not self.marked:
            return self.first(sample, len(sample.turns), False), []
        try:
            texts, marks = render_jinja_template(
                [messages(sample)],
                tools=sample.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the turns: {error}") from error
        return texts[0], list(marks[0])

    def first(self, sample: Sample, turns: int, prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages(sample)[:turns],
                tools=sample.tools,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the turns: {error}") from error
