"""Reads tokenised sets: any sample's tokens by its number, mapped from disk, and what is known of all of them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from conf.files import read_json


@dataclass(frozen=True)
class Part:
    """Some samples one after the other: sample i is tokens[offsets[i]:offsets[i + 1]], and trained says which of it."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """The samples of all parts, numbered through. `lengths` and `labels` are the tokens and the trained labels of each.

    Both are int64 of shape (samples,). A first token is never a label: nothing predicts it.
    """

    parts: Sequence[Part]
    first: NDArray[np.int64]
    """Number of each part's first sample, and of samples in all: shape (parts + 1,)."""
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(ids, 1 where trained) of one sample."""
        place = int(np.searchsorted(self.first, number, side="right")) - 1
        part, inside = self.parts[place], number - self.first[place]
        span = slice(part.offsets[inside], part.offsets[inside + 1])
        return part.tokens[span], part.trained[span]


def of(parts: Sequence[Part], labels: Sequence[NDArray[np.int32]] | None = None) -> Samples:
    """Samples of parts in memory or mapped; labels are counted where they are not known."""
    lengths = [np.diff(part.offsets).astype(np.int64) for part in parts]
    found = [_labels(part) for part in parts] if labels is None else labels
    first = np.concatenate([[0], np.cumsum([len(each) for each in lengths])]).astype(np.int64)
    return Samples(parts, first, _joined(lengths), _joined(found))


def read(sets: Sequence[Path]) -> Samples:
    """All samples of these sets, in order; tokens stay on disk until they are asked for."""
    folders = _folders(sets)
    parts = [
        Part(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "trained", "offsets")))
        for folder in folders
    ]
    return of(parts, [np.load(folder / "labels.npy") for folder in folders])


def is_whole(one: Path) -> bool:
    """Whether a set is there with all its parts: what cleans a scratch disk deletes single files."""
    about = read_json(one / "set.json")
    return about is not None and all(
        (one / f"part-{number:05d}" / f"{name}.npy").exists()
        for number in range(about["parts"])
        for name in ("tokens", "trained", "offsets", "labels")
    )


def hashes(one: Path, of: str = "hashes") -> NDArray[np.uint64]:
    """Of each sample of a set, 64 bits of its tokens and mask; `origins` are those of the first sample of its row."""
    return _joined([np.load(folder / f"{of}.npy") for folder in _folders([one])], np.uint64)


def places(one: Path, numbers: Sequence[int]) -> list[str]:
    """`file:line` of samples of a set, by their numbers in it."""
    names, folders = read_json(one / "set.json")["places"], _folders([one])
    first = [0, *accumulate(len(np.load(folder / "labels.npy", mmap_mode="r")) for folder in folders)]
    found = []
    for number in numbers:
        which = bisect_right(first, number) - 1
        file, row = (
            np.load(folders[which] / f"{name}.npy", mmap_mode="r")[number - first[which]]
            for name in ("files", "places")
        )
        found.append(f"{names[file]}{row}")
    return found


def _folders(sets: Sequence[Path]) -> list[Path]:
    return [folder for one in sets for folder in sorted(one.glob("part-*"))]


def _labels(part: Part) -> NDArray[np.int64]:
    if len(part.offsets) == 1:
        return np.zeros(0, dtype=np.int64)
    starts = part.offsets[:-1]
    return np.add.reduceat(part.trained, starts, dtype=np.int64) - part.trained[starts]


def _joined(arrays: Sequence[NDArray], dtype: type = np.int64) -> NDArray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype=dtype)
