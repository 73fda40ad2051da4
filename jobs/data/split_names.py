"""Tells training files from files of validation and test by their names, with the rules of the Hub; pure."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "heldout", "holdout"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
"""The words of the Hub, and two more for rows that are held out."""
SPLIT_OF_WORD = {
    word + ending: split for split, words in WORDS.items() for word in words for ending in ("", "set", "data")
}


class UnclearSplit(ValueError):
    """File names that do not say which files are for training; the message says why."""


def split_of(name: str) -> str | None:
    """train, validation or test, by the file's name, or else by the nearest folder that has such a word; None without one.

    Raises UnclearSplit if one name has words of two splits.
    """
    for part in reversed(PurePosixPath(name).parts):
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)]
        words += ["heldout"] if "held_out" in part.lower() or "held-out" in part.lower() else []
        splits = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
        if len(splits) > 1:
            raise UnclearSplit(f"the name {part} has words for {' and '.join(sorted(splits))}")
        if splits:
            return splits.pop()
    return None


def choose(names: Sequence[str], wanted: str | None = None) -> list[str]:
    """The names to read: those of the split `wanted`, or else those for training.

    Without `wanted`: if all named splits are one, all names. If there is a train split beside others, its names only. If
    there is none, the names that belong to no split. Raises UnclearSplit if that leaves nothing, or a name is unclear.
    """
    if wanted is not None:
        split = SPLIT_OF_WORD.get(wanted.lower(), wanted)
        chosen = [name for name in names if split_of(name) == split]
        if not chosen:
            raise UnclearSplit(f"no name has a word for {wanted}")
        return chosen
    try:
        splits = {name: split_of(name) for name in names}
    except UnclearSplit:
        if len(names) == 1:
            return list(names)
        raise
    found = set(splits.values()) - {None}
    if TRAIN in found:
        return list(names) if found == {TRAIN} else [name for name in names if splits[name] == TRAIN]
    without = [name for name in names if splits[name] is None]
    if found and without:
        return without
    if len(found) > 1:
        raise UnclearSplit(f"they are for {' and '.join(sorted(map(str, found)))}, and none is for train")
    return list(names)
