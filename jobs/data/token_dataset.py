"""Reads tokenized sets: any sample's tokens by its number, memory-mapped from disk, and the lengths of all samples."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.files import read_json

ROW_NUMBER = re.compile(r"\d+$")
"""The end of a location."""


@dataclass(frozen=True)
class Part:
    """Consecutive samples: sample i is tokens[offsets[i]:offsets[i + 1]], and `trained` is 1 for its trained tokens."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class TokenDataset:
    """The samples of all parts, numbered from 0 across all parts."""

    parts: Sequence[Part]
    first: NDArray[np.int64]
    """Number of each part's first sample, and at the end the number of all samples: shape (parts + 1,)."""
    lengths: NDArray[np.int64]
    """Tokens of each sample: shape (samples,)."""
    label_counts: NDArray[np.int64]
    """Trained labels of each sample: shape (samples,). A first token is never a label, because nothing predicts it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(token ids, 1 where trained) of one sample."""
        part_number = int(np.searchsorted(self.first, number, side="right")) - 1
        part, index = self.parts[part_number], number - self.first[part_number]
        span = slice(part.offsets[index], part.offsets[index + 1])
        return part.tokens[span], part.trained[span]


def from_parts(parts: Sequence[Part], labels: Sequence[NDArray[np.int32]] | None = None) -> TokenDataset:
    """A dataset of these parts, in memory or memory-mapped. Without `labels`, the trained labels are counted here."""
    lengths = [np.diff(part.offsets).astype(np.int64) for part in parts]
    counts = [_count_labels(part) for part in parts] if labels is None else labels
    first = np.concatenate([[0], np.cumsum([len(part_lengths) for part_lengths in lengths])]).astype(np.int64)
    return TokenDataset(parts, first, _concatenate(lengths), _concatenate(counts))


def open_sets(sets: Sequence[Path]) -> TokenDataset:
    """All samples of these set folders, in order. Tokens stay on disk until a sample is read."""
    folders = _part_folders(sets)
    parts = [
        Part(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "trained", "offsets")))
        for folder in folders
    ]
    return from_parts(parts, [np.load(folder / "labels.npy") for folder in folders])


def is_complete(set_folder: Path) -> bool:
    """Whether the set exists with all files of all parts.

    Every file is checked, because purge jobs of scratch file systems delete single files by age.
    """
    description = read_json(set_folder / "set.json")
    return description is not None and all(
        (set_folder / f"part-{number:05d}" / f"{name}.npy").exists()
        for number in range(description["parts"])
        for name in ("tokens", "trained", "offsets", "labels")
    )


def load_hashes(set_folder: Path, kind: str = "hashes") -> NDArray[np.uint64]:
    """A 64-bit hash for each sample of a set: shape (samples,).

    `hashes`: of the sample's tokens and trained mask. `origins`: of the first sample from the same row, so that all
    samples of a split row share it.
    """
    return _concatenate([np.load(folder / f"{kind}.npy") for folder in _part_folders([set_folder])], np.uint64)


def row_locations(set_folder: Path, numbers: Sequence[int]) -> list[str]:
    """Where the rows of these samples (by their numbers in the set) were read: `file:line`, or `owner/name row N`."""
    prefixes, folders = read_json(set_folder / "set.json")["places"], _part_folders([set_folder])
    first = [0, *accumulate(len(np.load(folder / "labels.npy", mmap_mode="r")) for folder in folders)]
    locations = []
    for number in numbers:
        part = bisect_right(first, number) - 1
        file, row = (
            np.load(folders[part] / f"{name}.npy", mmap_mode="r")[number - first[part]] for name in ("files", "places")
        )
        locations.append(f"{prefixes[file]}{row}")
    return locations


def samples_at(set_folder: Path, locations: Sequence[str]) -> dict[str, list[int]]:
    """Numbers in the set of the samples at each of these locations, as `row_locations` returns them; several if a row was split.

    A row that was left out has none, so its location is not in the result.
    """
    prefixes, folders = read_json(set_folder / "set.json")["places"], _part_folders([set_folder])
    wanted = {int(digits[0]) for location in locations if (digits := ROW_NUMBER.search(location))}
    found: dict[str, list[int]] = {}
    first = 0
    for folder in folders if wanted else ():
        files, places = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("files", "places"))
        for index in np.flatnonzero(np.isin(places, list(wanted))).tolist():
            found.setdefault(f"{prefixes[files[index]]}{places[index]}", []).append(first + index)
        first += len(places)
    return {location: found[location] for location in locations if location in found}


def _part_folders(sets: Sequence[Path]) -> list[Path]:
    return [folder for set_folder in sets for folder in sorted(set_folder.glob("part-*"))]


def _count_labels(part: Part) -> NDArray[np.int64]:
    if len(part.offsets) == 1:
        return np.zeros(0, dtype=np.int64)
    starts = part.offsets[:-1]
    counts: NDArray[np.int64] = np.add.reduceat(part.trained, starts, dtype=np.int64)
    return counts - part.trained[starts]


def _concatenate(arrays: Sequence[NDArray[Any]], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype=dtype)
