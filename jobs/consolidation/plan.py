"""Plans what will be written before any weight is read: files, their headers, and for each source tensor where its bytes go."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from jobs.tensor_io import dtypes, safetensors
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import StoredTensor

if TYPE_CHECKING:  # lora imports torch, which a merge without an adapter does not need
    from jobs.consolidation.lora import LoraUpdate


@dataclass(frozen=True)
class Output:
    """A tensor of the result: `numel` elements of a source tensor, from the flat element `start` on."""

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
class PlacedOutput:
    """An output, its file and the byte in that file at which it begins."""

    output: Output
    file: str
    offset: int


@dataclass(frozen=True)
class Task:
    """One source tensor, which one worker reads from the first element to the last."""

    name: str
    stored: StoredTensor
    placed: tuple[PlacedOutput, ...]
    """The outputs that are made of it, sorted by their first element."""
    sha256: str | None = None
    """Fingerprint of its fp32 elements that training recorded; compared while they are read."""
    update: "LoraUpdate | None" = None
    """What an adapter adds to it."""
    nf4_compute: Dtype | None = None
    """Compute dtype of training, if the source is to be rounded to NF4 first, as training had it."""
    rounded: Dtype | None = None
    """Dtype to which the source is rounded first, because training had it so."""

    @property
    def dtype_before_cast(self) -> Dtype:
        """Dtype of the elements just before they are cast to the dtype of an output."""
        return dtypes.FP32 if self.update is not None else self.nf4_compute or self.rounded or self.stored.dtype


@dataclass(frozen=True)
class Plan:
    """The files of the result and the tasks that fill them. Plain data, made in seconds for a model of any size."""

    headers: dict[str, bytes]
    """The first bytes of each file."""
    sizes: dict[str, int]
    """Bytes of each file."""
    tasks: tuple[Task, ...]
    index: dict[str, Any] | None
    """Content of model.safetensors.index.json, if there are several files."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Everything else that decides the bytes of the result; part of the digest."""

    @property
    def read_bytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(task.stored.file_bytes for task in self.tasks)

    @property
    def written_bytes(self) -> int:
        """Bytes of all files of the result."""
        return sum(self.sizes.values())

    def digest(self) -> str:
        """SHA-256; two plans with the same digest write the same bytes."""
        total = hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode())
        for name, header in self.headers.items():
            total.update(name.encode() + header)
        for task in self.tasks:
            total.update(repr((task.name, task.stored, task.sha256, task.rounded)).encode())
        return total.hexdigest()


def make_plan(
    outputs: list[Output],
    sources: dict[str, StoredTensor],
    *,
    shard_bytes: int,
    fingerprints: Mapping[str, str] | None = None,
    updates: "Mapping[str, LoraUpdate] | None" = None,
    nf4_sources: Mapping[str, Dtype] | None = None,
    rounded: Mapping[str, Dtype] | None = None,
    identity: dict[str, Any] | None = None,
    stem: str = "model",
) -> Plan:
    """Put the outputs, in their order, into files of at most `shard_bytes`; a larger tensor gets a file of its own.

    `fingerprints`, `updates`, `nf4_sources` (the compute dtype of training) and `rounded` (the dtype in which training had a
    frozen weight) are by source name. Files are called STEM.safetensors, or STEM-00001-of-00004.safetensors.
    """
    files = _split_into_files(outputs, shard_bytes, stem)
    headers, sizes, placed = {}, {}, []
    for file, items in files.items():
        tensors = [(item.name, item.shape, item.dtype) for item in items]
        headers[file], offsets, sizes[file] = safetensors.make_header(tensors)
        placed += [PlacedOutput(item, file, offset) for item, offset in zip(items, offsets, strict=True)]
    # a source that only has a fingerprint is read too, and compared
    placed_of_source: dict[str, list[PlacedOutput]] = {name: [] for name in fingerprints or {}}
    for item in placed:
        placed_of_source.setdefault(item.output.source, []).append(item)
    tasks = [
        Task(
            name,
            sources[name],
            tuple(sorted(items, key=lambda item: item.output.start)),
            (fingerprints or {}).get(name),
            (updates or {}).get(name),
            (nf4_sources or {}).get(name),
            (rounded or {}).get(name),
        )
        for name, items in placed_of_source.items()
    ]
    return Plan(headers, sizes, _sorted_tasks(tasks, list(files)), _index(files), identity or {})


def _split_into_files(outputs: list[Output], shard_bytes: int, stem: str) -> dict[str, list[Output]]:
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


def _sorted_tasks(tasks: list[Task], files: list[str]) -> tuple[Task, ...]:
    """File by file, so that files are finished early; in a file the largest first, so that no worker starts a large tensor
    when the others have nothing left to do."""
    order = {file: number for number, file in enumerate(files)}

    def key(task: Task) -> tuple[int, int]:
        return min((order[item.file] for item in task.placed), default=-1), -task.stored.nbytes

    return tuple(sorted(tasks, key=key))


def _index(files: dict[str, list[Output]]) -> dict[str, Any] | None:
    if len(files) == 1:
        return None
    outputs = [output for group in files.values() for output in group]
    return {
        "metadata": {
            "total_parameters": sum(output.numel for output in outputs),
            "total_size": sum(output.nbytes for output in outputs),
        },
        "weight_map": {output.name: file for file, group in files.items() for output in group},
    }
