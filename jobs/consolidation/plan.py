"""What will be written, before any weight is read: the files, their headers, and for each source tensor where its bytes go."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from jobs.tensor_io import dtypes, safetensors
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import Stored

if TYPE_CHECKING:  # it imports torch, which merges without an adapter do without
    from jobs.consolidation.lora import Update


@dataclass(frozen=True)
class Output:
    """A tensor of the result: `numel` elements of a source tensor from the flat element `start` on."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    source: str
    start: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Placed:
    """An output in its file."""

    output: Output
    file: str
    offset: int


@dataclass(frozen=True)
class Task:
    """One source tensor, read from its first element to its last by one worker."""

    name: str
    stored: Stored
    placed: tuple[Placed, ...]
    sha256: str | None = None
    """Of its elements as training had them; compared while they pass."""
    update: "Update | None" = None
    """What an adapter adds to it."""
    packed: Dtype | None = None
    """Precision of compute in which training had it in NF4; it is then rounded to that first."""

    @property
    def has(self) -> Dtype:
        """What its elements are before they are cast to what is written."""
        return dtypes.FP32 if self.update is not None else self.packed or self.stored.dtype


@dataclass(frozen=True)
class Plan:
    """Pure data: made in seconds for a model of any size."""

    heads: dict[str, bytes]
    """The first bytes of each file."""
    sizes: dict[str, int]
    tasks: tuple[Task, ...]
    index: dict[str, Any] | None
    """Of model.safetensors.index.json, where there are several files."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else decides the bytes: part of the digest."""

    @property
    def read_bytes(self) -> int:
        return sum(task.stored.nbytes for task in self.tasks)

    @property
    def written_bytes(self) -> int:
        return sum(self.sizes.values())

    def digest(self) -> str:
        """Two plans with the same one write the same bytes."""
        found = hashlib.sha256(json.dumps(self.about, sort_keys=True, default=str).encode())
        for name, head in self.heads.items():
            found.update(name.encode() + head)
        for task in self.tasks:
            found.update(repr((task.name, task.stored, task.sha256)).encode())
        return found.hexdigest()


def plan(
    outputs: list[Output],
    sources: dict[str, Stored],
    shard_bytes: int,
    prints: dict[str, str],
    updates: "dict[str, Update]",
    about: dict[str, Any],
    stem: str = "model",
    packed: Mapping[str, Dtype] | None = None,
) -> Plan:
    """Lay the outputs into files of at most `shard_bytes`, in their order; a larger tensor has a file of its own."""
    files = _files(outputs, shard_bytes, stem)
    heads, sizes, placed = {}, {}, []
    for file, items in files.items():
        heads[file], offsets, sizes[file] = safetensors.make_header(
            [(item.name, item.shape, item.dtype) for item in items]
        )
        placed += [Placed(item, file, offset) for item, offset in zip(items, offsets, strict=True)]
    return Plan(
        heads, sizes, _tasks(placed, list(files), sources, prints, updates, packed or {}), _index(files, stem), about
    )


def _files(outputs: list[Output], shard_bytes: int, stem: str) -> dict[str, list[Output]]:
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def _tasks(
    placed: list[Placed],
    files: list[str],
    sources: dict[str, Stored],
    prints: dict[str, str],
    updates: "dict[str, Update]",
    packed: Mapping[str, Dtype],
) -> tuple[Task, ...]:
    """A task for each source tensor that is written or checked: file by file, so that files are finished early, the
    largest of a file first, so that no worker starts with one when the others are done."""
    goals: dict[str, list[Placed]] = {name: [] for name in prints}
    for item in placed:
        goals.setdefault(item.output.source, []).append(item)
    tasks = [
        Task(
            name,
            sources[name],
            tuple(sorted(items, key=lambda item: item.output.start)),
            prints.get(name),
            updates.get(name),
            packed.get(name),
        )
        for name, items in goals.items()
    ]
    order = {file: number for number, file in enumerate(files)}
    return tuple(
        sorted(
            tasks,
            key=lambda task: (min((order[item.file] for item in task.placed), default=-1), -task.stored.nbytes),
        )
    )


def _index(files: dict[str, list[Output]], stem: str) -> dict[str, Any] | None:
    if len(files) == 1:
        return None
    every = [output for group in files.values() for output in group]
    return {
        "metadata": {
            "total_parameters": sum(output.numel for output in every),
            "total_size": sum(output.nbytes for output in every),
        },
        "weight_map": {output.name: file for file, group in files.items() for output in group},
    }
