"""Refuses texts with half a character, which cannot become tokens."""

from jobs.data.row_values import Row, to_json
from jobs.tokenization.conversation import Sample

NO_OTHERS = (None,) * 5


def refuse_cut_characters(sample: Sample, row: Row) -> None:
    """Raise ValueError if a text of the sample has one half of a surrogate pair alone. row: the row of the sample."""
    if _has_cut_character(sample):
        column = next((name for name, value in row.items() if _has_lone_surrogate(to_json(value))), "the row")
        raise ValueError(
            f"{column} holds half a character (a surrogate such as \\ud83d without its other half): "
            "an emoji was cut in two; repair the text, or drop the row"
        )


def _has_cut_character(sample: Sample) -> bool:
    """Whether any text of the sample that may become tokens has one half of a surrogate pair alone."""
    for text, _ in sample.parts:
        if not text.isascii() and _has_lone_surrogate(text):
            return True
    for turn in sample.turns:
        if not turn.content.isascii() and _has_lone_surrogate(turn.content):
            return True
        others = (turn.tool_calls, turn.reasoning_content, turn.name, turn.tool_call_id, turn.extra)
        if others != NO_OTHERS and any(_has_lone_surrogate(_as_text(value)) for value in others if value):
            return True
    if sample.tools or sample.documents or sample.template_kwargs:
        return _has_lone_surrogate(to_json([sample.tools, sample.documents, sample.template_kwargs]))
    return False


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else to_json(value)


def _has_lone_surrogate(text: str) -> bool:
    """Whether the text has one half of a surrogate pair alone, which UTF-8 cannot encode."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
