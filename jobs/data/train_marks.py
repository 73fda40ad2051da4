"""Reads the keys of a message that say whether it, or which characters of it, are trained."""

from collections.abc import Mapping
from typing import Any

from conf.columns import TRAIN_DETAIL_KEYS, TRAIN_KEYS
from jobs.data.row_values import Row, is_null, short

OTHER_MARKS = (
    "mask",
    "masked",
    "loss_mask",
    "loss_weight",
    "trainable",
    "is_trained",
    "train_mask",
    "weights",
    "compute_loss",
)
"""Keys that other programs use to say whether to train on a message."""


def read_train(message: Mapping[str, Any], where: str) -> bool | None:
    """Whether to train on a message; None if it does not say. Raises ValueError for fractions, and if two keys disagree."""
    marks = {key: message[key] for key in TRAIN_KEYS if not is_null(message.get(key))}
    for key, value in marks.items():
        if isinstance(value, list | tuple | Mapping) or value not in (0, 1):
            raise ValueError(
                f"{where}.{key} is {short(value)}: give true or false (or 1 or 0) to say whether to train on the turn; "
                "other weights are not supported"
            )
    if len(set(marks.values())) > 1:
        raise ValueError(f"{where} has {' and '.join(marks)}, which disagree: remove one, or name it in data.ignore")
    return bool(next(iter(marks.values()))) if marks else None


def refuse_other_marks(message: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a key that seems to say whether to train on the message, but is none that is read."""
    if key := next((key for key in OTHER_MARKS if not is_null(message.get(key))), None):
        raise ValueError(
            f"{where} has the key {key}, which is not read: write `train` with true or false instead, "
            f"or set data.ignore=[{key}] if it does not decide what is trained"
        )


def refuse_marks_in_columns(row: Row) -> None:
    """Raise ValueError for a column with one mark for each message, because only marks in the messages are read."""
    for name in (*TRAIN_KEYS, *OTHER_MARKS):
        if isinstance(row.get(name), list | tuple) and row[name]:
            raise ValueError(
                f"the column {name} is a list, and marks are read only in the messages: write `train` with true or false "
                f"into each message, or set data.ignore=[{name}] if it does not decide what is trained"
            )


def read_train_detail(message: Mapping[str, Any], where: str) -> tuple[tuple[int, int, bool], ...]:
    """(begin, end, trained) of parts of the content in order, from Axolotl's train_detail, whose end_offset is included."""
    key = next((key for key in TRAIN_DETAIL_KEYS if message.get(key)), None)
    if key is None:
        return ()
    form = "give a list of {begin_offset, end_offset, train}, where end_offset is the last character"
    if not isinstance(message[key], list | tuple):
        raise ValueError(f"{where}.{key} is {short(message[key])}: {form}")
    parts = []
    for number, part in enumerate(message[key]):
        begin, end = (
            (part.get(name) for name in ("begin_offset", "end_offset")) if isinstance(part, Mapping) else (0, None)
        )
        train = part.get("train") if isinstance(part, Mapping) else None
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end or not isinstance(train, bool):
            raise ValueError(f"{where}.{key}[{number}] is {short(part)}: {form}")
        parts.append((begin, end + 1, train))
    parts.sort()
    if any(later[0] < earlier[1] for earlier, later in zip(parts, parts[1:], strict=False)):
        raise ValueError(
            f"{where}.{key} has parts that overlap: correct their offsets, of which end_offset is included"
        )
    return tuple(parts)


def check_train_detail(detail: tuple[tuple[int, int, bool], ...], raw: object, text: str, where: str) -> None:
    """Raise ValueError if these parts cannot be parts of the message's text. raw: the content as the row has it."""
    if detail and not isinstance(raw, str):
        raise ValueError(f"{where}.train_detail needs a content that is one text: join its parts, or drop the row")
    if detail and detail[-1][1] > len(text):
        raise ValueError(
            f"{where}.train_detail ends at character {detail[-1][1] - 1}, but the content has {len(text)}: correct its offsets"
        )


def without_gaps(detail: tuple[tuple[int, int, bool], ...], length: int) -> tuple[tuple[int, int, bool], ...]:
    """The same parts, with untrained ones between them: what train_detail does not name is not trained."""
    parts, position = [], 0
    for begin, end, train in detail:
        parts += [(position, begin, False)] if begin > position else []
        parts.append((begin, end, train))
        position = end
    return (*parts, *([(position, length, False)] if detail and position < length else []))
