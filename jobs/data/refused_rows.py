"""Refuses rows that would load without an error, but teach the wrong thing: preferences, pictures, sound, single messages."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from conf.columns import MESSAGES, OUTPUT
from jobs.data.row_values import Row, is_filled
from jobs.tokenization.conversation import Sample

PREFERENCE = re.compile(
    r"(?:\w+_)?(?:chosen|rejected)(?:_\w+)?|kto_tag|(?:non_)?preferred_output|preferences?|overall_preference"
    r"|better_response_id|safer_response_id|human_ref_[AB]|(?:is_)?desirable|kto_label",
    re.IGNORECASE,
)
"""Columns of DPO, KTO and reward data: TRL, ms-swift, LLaMA-Factory, OpenAI, OpenRLHF, UltraFeedback, SafeRLHF, HelpSteer3, SHP."""
MEDIA = re.compile(
    r"(?:input_)?(?:image|img|picture|photo|audio|video|wav)s?(?:_?(?:path|file|file_?name|url|bytes|list|base64)s?)?"
    r"|pixel_values(?:_videos)?|input_features|(?:image|video)_grid_thw|multi_?modal_data|mm_data",
    re.IGNORECASE,
)
LABELED = ("completion", *MESSAGES, *OUTPUT)
"""Columns beside which a `label` of true or false says whether the answer is good."""
TAG = r"<\|?(?:image|video|audio)(?:_\d+)?\|?>"
PLACEHOLDER = re.compile(
    rf"\A\s*({TAG})|^[ \t]*({TAG})[ \t]*$|({TAG})\s*{TAG}|({TAG})\s*\Z|(<img>[^<>\s]+</img>)", re.MULTILINE
)
"""A picture's place in a text as in LLaVA, LLaMA-Factory, ms-swift, Phi and Qwen-VL: at the beginning or the end, alone on a line,
beside another one, or around the name of a file."""
OPTIONS = ("choices", "options")
SPEAKERS = ("prompter", "human", "user", "assistant", "gpt", "bot", "system", "tool")


def refuse_other_kinds(row: Row) -> None:
    """Raise ValueError if the row has columns of preferences, pictures or sound, or is one message of a chat."""
    if row.get("role") in SPEAKERS and any(isinstance(row.get(name), str) for name in ("text", "content")):
        raise ValueError(
            "the column role says that each row is one message of a chat: join the messages of a chat into one row, "
            '{"messages": [{"role": ..., "content": ...}, ...]}, or set data.ignore=[role] if each text stands alone'
        )
    preferences, media, has_answer = _suspects(tuple(row))
    if preferences and (column := next((name for name in preferences if is_filled(row[name])), None)):
        others = [name for name in preferences if name != column and is_filled(row[name])]
        raise ValueError(
            f"the column {column} marks preference data, which is not supported: keep only the good answers, as rows of "
            f"another format. To train on this row's other columns, set data.ignore=[{','.join([column, *others])}]"
        )
    if has_answer and _is_verdict(row.get("label")):
        raise ValueError(
            "the column label marks preference data (good or bad answers), which is not supported: keep the rows where it "
            "is true, and set data.ignore=[label]"
        )
    if media and (column := next((name for name in media if is_filled(row[name])), None)):
        others = [name for name in media if name != column and is_filled(row[name])]
        raise ValueError(
            f"the column {column} is not text, and only text is supported: drop the row, or set "
            f"data.ignore=[{','.join([column, *others])}] if the texts do not need it"
        )


def refuse_options(row: Row, question: str | None) -> None:
    """Raise ValueError if a column holds the options of a question, which nothing reads. question: the column of the question."""
    for name in OPTIONS:
        if question and isinstance(row.get(name), list | tuple | Mapping) and row[name]:
            raise ValueError(
                f"the column {name} holds options of the question, and is not read: write them into the question, with "
                f"data.fields.instruction='\"{{{{ {question} }}}} {{{{ {name} | tojson }}}}\"', or set data.ignore=[{name}]"
            )


def refuse_rivals(row: Row, names: tuple[str, ...]) -> None:
    """Raise ValueError if two of these columns, of which only one is read, have different values.

    A longer question that holds the other is its copy in a prompt format, which many sets have.
    """
    filled = [name for name in names if is_filled(row.get(name))]
    for other in filled[1:]:
        first, second = row[filled[0]], row[other]
        is_copy = names is not OUTPUT and isinstance(second, str) and str(first).strip() in second
        if first != second and not is_copy:
            raise ValueError(
                f"{filled[0]} and {other} are both a row's {names[0]}, and they differ: set data.ignore=[{other}], or name "
                f"the one to read, as in data.fields.{names[0]}={other}"
            )


def media_column(row: Row) -> str | None:
    """The first column (or key of a message) that holds pictures or sound."""
    return next((name for name in row if MEDIA.fullmatch(name) and is_filled(row[name])), None)


def refuse_media_placeholders(sample: Sample) -> None:
    """Raise ValueError if a question has the place of a picture, a video or a sound, which the row does not hold."""
    for turn in sample.turns:
        if "<" in turn.content and turn.role in ("user", "system"):
            _refuse_placeholder(turn.content)
    if len(sample.parts) > 1 and "<" in sample.parts[0][0]:
        _refuse_placeholder(sample.parts[0][0])


def _refuse_placeholder(text: str) -> None:
    for match in (
        PLACEHOLDER.finditer(text) if any(name in text for name in ("image", "video", "audio", "<img>")) else ()
    ):
        found = next(filter(None, match.groups()))
        kind = found.strip("<|>").partition("_")[0]
        if f"</{kind}>" not in text or kind.startswith("img"):
            raise ValueError(
                f"a question has {found} where a picture or sound belongs, and only text is supported: drop the row; "
                f"if it is meant as text, write `{found}` in backticks"
            )


@lru_cache(maxsize=1024)
def _suspects(columns: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """(columns named like preferences, columns named like media, whether the row has an answer and a column label)."""
    names = [name for name in columns if isinstance(name, str)]
    has_answer = "label" in columns and any(name in columns for name in LABELED)
    return _matching(PREFERENCE, names), _matching(MEDIA, names), has_answer


def _matching(pattern: re.Pattern[str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if pattern.fullmatch(name))


def _is_verdict(label: object) -> bool:
    if isinstance(label, str):  # as in CSV
        return label.strip().lower() in ("true", "false", "0", "1")
    return isinstance(label, bool | int | float) and label in (0, 1)
