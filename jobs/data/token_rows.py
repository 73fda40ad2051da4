"""Reads rows that are tokens already, also rows that hold several samples one after the other (packed rows)."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from conf.columns import TRAINED_TOKENS
from jobs.data.row_values import Row, is_null, parse_list, short
from jobs.tokenization.conversation import EmptyText, Sample

MAX_TOKEN_ID = 2**31 - 1
"""Highest token id that an int32 can store. The gate `vocabulary` checks ids against the tokenizer."""
CUMULATIVE = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seqlens_q", "sequence_lengths", "seq_lens", "seqlens")
"""Other names of packed rows' borders, which are refused."""


def convert_tokens(row: Row) -> Sample:
    """The sample or samples of a row of tokens. Padding (attention_mask 0) is removed. Without labels, every token is trained.

    Borders of packed samples: position_ids that begin again at 0, seq_lengths, segment_ids, or an attention_mask with a number
    for each sample. If the row has several of them, they must agree.
    """
    ids = _numbers(row, "input_ids", "token ids")
    if set(map(type, ids)) - {int} or (ids and max(max(ids), -min(ids)) > MAX_TOKEN_ID):
        bad = next(index for index, token in enumerate(ids) if type(token) is not int or abs(token) > MAX_TOKEN_ID)
        remedy = "give one row for each list" if isinstance(ids[bad], list) else "give integers, or drop the row"
        raise ValueError(f"input_ids[{bad}] is {short(ids[bad])}, not a token id: {remedy}")
    if name := next((name for name in CUMULATIVE if not is_null(row.get(name))), None):
        raise ValueError(
            f"the column {name} says that the row holds several samples, in a way that is not supported: give their lengths as "
            f"seq_lengths, or set data.ignore=[{name}] if the row is one sample"
        )
    labels = _labels(row, ids)
    mask = _column(row, "attention_mask", "0 and 1", len(ids)) or [1] * len(ids)
    if mask and min(mask) < 0:
        raise ValueError(f"attention_mask has {min(mask)}: give 1 for each token and 0 for padding")
    kept = [index for index, value in enumerate(mask) if value]
    if not kept:
        raise EmptyText("input_ids is empty: drop the row")
    mismatch = None
    if labels != ids:
        mismatch = next((index for index in kept if labels[index] not in (-100, ids[index])), None)
    if mismatch is not None:
        raise ValueError(
            f"a label is {short(labels[mismatch])} where the token is {ids[mismatch]}: "
            "a label must be the token itself or -100; do not shift the labels"
        )
    lengths = _lengths(row, mask, kept)
    if len(kept) < len(ids):
        ids, labels = [ids[index] for index in kept], [labels[index] for index in kept]
    return Sample(
        ids=tuple(ids),
        labels=tuple(labels),
        lengths=lengths if len(lengths) > 1 else (),
    )


def _numbers(row: Row, column: str, content: str) -> list[Any]:
    value = parse_list(row.get(column), column)
    if is_null(value):
        raise ValueError(f"{column} is null: give a list of {content}, or drop the row")
    if not isinstance(value, list | tuple):
        raise ValueError(f"{column} is {short(value)}, not a list: give a list of {content}, or drop the row")
    return list(value)


def _column(row: Row, column: str, content: str, length: int) -> list[Any] | None:
    """The numbers of a column beside the tokens, one for each; None if the row has no such column."""
    if is_null(row.get(column)):
        return None
    values = _numbers(row, column, content)
    if len(values) != length:
        raise ValueError(f"input_ids has {length} tokens, {column} {len(values)}: both must have the same length")
    if not set(map(type, values)) - {int, bool}:
        return values
    wrong = next((value for value in values if not isinstance(value, int)), 0)
    if isinstance(wrong, list | tuple):
        raise ValueError(f"{column} holds lists, not numbers: give {content}, or set data.ignore=[{column}]")
    if column != "labels" and not isinstance(wrong, int):
        raise ValueError(
            f"{column} has {short(wrong)}, not a whole number: give {content}, or set data.ignore=[{column}]"
        )
    return values


def _labels(row: Row, ids: list[int]) -> list[Any]:
    """The labels, or else the tokens themselves, without those that a mask such as TRL's completion_mask does not train."""
    labels = _column(row, "labels", "token ids and -100", len(ids)) or ids
    for name in TRAINED_TOKENS:
        if mask := _column(row, name, "0 and 1", len(ids)):
            if any(value not in (0, 1) for value in mask):
                raise ValueError(f"{name} has other values than 0 and 1: correct it, or set data.ignore=[{name}]")
            labels = [label if trained else -100 for label, trained in zip(labels, mask, strict=True)]
    return labels


def _lengths(row: Row, mask: list[int], kept: list[int]) -> tuple[int, ...]:
    """The number of tokens of each sample in the row, without padding."""
    found: dict[str, tuple[int, ...]] = {}
    if max(mask) > 1:
        found["attention_mask"] = _runs([mask[index] for index in kept], "attention_mask")
    segments = _column(row, "segment_ids", "the number of each token's sample", len(mask))
    if segments is not None:
        if 0 in segments and segments[0] != 0:
            raise ValueError("segment_ids has 0 after other numbers: if it marks padding, give attention_mask as well")
        found["segment_ids"] = _runs([segments[index] for index in kept], "segment_ids")
    positions = _column(row, "position_ids", "the position of each token in its sample", len(mask))
    if positions is not None:
        found["position_ids"] = _restarts([positions[index] for index in kept])
    if not is_null(row.get("seq_lengths")):
        found["seq_lengths"] = _given_lengths(row, mask)
    if len(set(found.values())) > 1:
        lengths = ", ".join(f"{name} {list(value)[:8]}" for name, value in found.items())
        raise ValueError(
            f"the columns that say where samples begin disagree ({lengths}): correct them, or ignore one with data.ignore"
        )
    return next(iter(found.values()), ())


def _runs(numbers: Sequence[Any], column: str) -> tuple[int, ...]:
    runs = [(number, len(list(group))) for number, group in groupby(numbers)]
    if len({number for number, _ in runs}) < len(runs):
        raise ValueError(
            f"{column} has the same number for tokens that are not in a row: give each sample its own number"
        )
    return tuple(length for _, length in runs)


def _restarts(positions: list[Any]) -> tuple[int, ...]:
    starts = [0]
    for index, (before, position) in enumerate(zip(positions, positions[1:], strict=False), 1):
        if position == before + 1:
            continue
        if position != 0:
            raise ValueError(
                f"position_ids[{index}] is {short(position)} after {short(before)}: positions must count up by one, and begin "
                "again at 0 for the next sample; correct them, or set data.ignore=[position_ids]"
            )
        starts.append(index)
    ends = [*starts[1:], len(positions)]
    return tuple(end - start for start, end in zip(starts, ends, strict=True))


def _given_lengths(row: Row, mask: list[int]) -> tuple[int, ...]:
    lengths = _numbers(row, "seq_lengths", "lengths")
    if any(type(length) is not int or length < 1 for length in lengths) or sum(lengths) != len(mask):
        raise ValueError(
            f"seq_lengths is {short(lengths)}, but input_ids has {len(mask)} tokens: give the length of each sample, in order"
        )
    result, start = [], 0
    for length in lengths:
        result.append(sum(1 for value in mask[start : start + length] if value))
        start += length
    return tuple(length for length in result if length)
