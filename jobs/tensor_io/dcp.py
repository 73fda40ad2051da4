"""Finds the tensors of torch's distributed checkpoints (FSDP2, HSDP, tensor parallelism) from their `.metadata` file alone."""

from math import prod
from operator import index as whole_number
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from jobs.tensor_io import safe_pickle
from jobs.tensor_io.layout import Chunk, Extent, StoredTensor, rectangles
from jobs.tensor_io.untrusted import refused_if_damaged, stays_inside

StorageInfos = dict[tuple[str, tuple[int, ...]], Any]
"""(key, first index of the chunk) -> DCP's _StorageInfo: `relative_path`, `offset`, `length`."""

LISTED_PROBLEMS = 10


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by its key, including optimizer state. Raises RunError if a shard file is missing, cut short or damaged."""
    metadata = safe_pickle.load_dcp_metadata(folder / ".metadata")
    with refused_if_damaged(folder / ".metadata"):
        infos = {
            (index.fqn, tuple(getattr(index, "offset", None) or ())): info
            for index, info in metadata.storage_data.items()
        }
        _check_files(folder, infos)
        return {
            key: _stored(folder, key, entry, infos)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, safe_pickle.TensorMetadata)
        }


def _check_files(folder: Path, infos: StorageInfos) -> None:
    """Raise RunError if a file that the metadata names does not exist, or is smaller than what should be in it."""
    needed_bytes: dict[str, int] = {}
    for info in infos.values():
        end = whole_number(info.offset) + whole_number(info.length)
        needed_bytes[info.relative_path] = max(needed_bytes.get(info.relative_path, 0), end)
    problems = []
    for name, size in sorted(needed_bytes.items()):
        path = folder / name
        if not name or not stays_inside(path, folder):
            message = f"names {name:.200}, which is outside its folder: copy that file into it"
            problems.append(Problem("checkpoint", folder / ".metadata", message))
        elif not path.is_file():
            problems.append(Problem("checkpoint", path, "is missing: copy this shard too, or merge another step"))
        elif path.stat().st_size < size:
            message = f"is cut short: {path.stat().st_size} of {size} bytes; copy it again, or merge another step"
            problems.append(Problem("checkpoint", path, message))
    if problems:
        more = len(problems) - LISTED_PROBLEMS
        raise RunError(*problems[:LISTED_PROBLEMS], *([f"and {more} more files"] if more > 0 else []))


def _stored(folder: Path, key: str, entry: safe_pickle.TensorMetadata, infos: StorageInfos) -> StoredTensor:
    shape, dtype = tuple(entry.size), entry.properties.state[0]
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks if prod(chunk.sizes)}
    chunks = [Chunk(starts, size) for starts, size in sizes.items()]
    if not all(_is_in(shape, chunk) for chunk in chunks):
        raise RunError(Problem("checkpoint", folder, f"has a part of {key} outside its shape: merge another step"))
    width, rectangles_of_chunks = rectangles(shape, chunks)
    extents = []
    for chunk, parts in zip(chunks, rectangles_of_chunks, strict=True):
        info = infos.get((key, chunk.starts))
        if info is None:
            message = f"has no data for {key} at index {list(chunk.starts)}: merge another step"
            raise RunError(Problem("checkpoint", folder, message))
        if getattr(info, "transform_descriptors", None):
            message = f"stores {key} with the transform {info.transform_descriptors}: save it without"
            raise RunError(Problem("checkpoint", folder, message))
        path = str(folder / info.relative_path)
        for part in parts:
            extents.append(
                Extent(
                    path,
                    info.offset,
                    part.row,
                    part.rows,
                    part.column,
                    part.columns,
                    archive=info.length,
                    skip=part.element,
                )
            )
    extents.sort(key=lambda extent: (extent.row, extent.column))
    if sum(extent.rows * extent.columns for extent in extents) != prod(entry.size):
        raise RunError(Problem("checkpoint", folder, f"lacks parts of {key}: merge another step"))
    return StoredTensor(shape, dtype, tuple(extents), width)


def _is_in(shape: tuple[int, ...], chunk: Chunk) -> bool:
    """Whether a chunk is a box inside a tensor of this shape."""
    starts, sizes = chunk
    if not len(shape) == len(starts) == len(sizes):
        return False
    if any(type(number) is not int or number < 0 for number in (*shape, *starts, *sizes)):
        return False
    return all(start + size <= whole for start, size, whole in zip(starts, sizes, shape, strict=True))
