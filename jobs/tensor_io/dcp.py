"""torch's distributed checkpoints (FSDP2, HSDP, tensor parallel): every tensor's chunks, from `.metadata` alone."""

from math import prod
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from jobs.tensor_io import safe_pickle
from jobs.tensor_io.layout import Extent, Stored, rectangles


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its key, optimizer state too. Raises RunError when a shard file is missing or short."""
    found = safe_pickle.dcp_metadata(folder / ".metadata")
    where = {
        (index.fqn, tuple(getattr(index, "offset", None) or ())): info for index, info in found.storage_data.items()
    }
    _complete(folder, where)
    return {
        key: _stored(folder, key, entry, where)
        for key, entry in found.state_dict_metadata.items()
        if isinstance(entry, safe_pickle.Tensor)
    }


def _complete(folder: Path, where: dict[Any, Any]) -> None:
    """Compare the files with what the metadata says lies in them: first by name, then by size."""
    needed: dict[str, int] = {}
    for info in where.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name, size in sorted(needed.items()):
        path = folder / name
        if not path.is_file():
            problems.append(Problem("checkpoint", path, "is missing: copy this shard too, or merge another step"))
        elif path.stat().st_size < size:
            said = f"is cut short: {path.stat().st_size} of {size} bytes; copy it again, or merge another step"
            problems.append(Problem("checkpoint", path, said))
    if problems:
        raise RunError(*problems[:10], *([f"and {len(problems) - 10} more"] if len(problems) > 10 else []))


def _stored(folder: Path, key: str, entry: Any, where: dict[Any, Any]) -> Stored:
    shape, dtype = tuple(entry.size), entry.properties.state[0]
    chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks if prod(chunk.sizes)}
    width, boxes = rectangles(shape, list(chunks.items()))
    extents = []
    for starts, rows in zip(chunks, boxes, strict=True):
        info = where.get((key, starts))
        if info is None:
            raise RunError(Problem("checkpoint", folder, f"nothing was saved of {key} at {starts}: merge another step"))
        if getattr(info, "transform_descriptors", None):
            raise RunError(
                Problem("checkpoint", folder, f"{key} is stored with {info.transform_descriptors}: save it plainly")
            )
        for row, count, column, columns, element in rows:
            path = str(folder / info.relative_path)
            extents.append(Extent(path, info.offset, row, count, column, columns, info.length, element))
    extents.sort(key=lambda extent: (extent.row, extent.column))
    if sum(extent.rows * extent.columns for extent in extents) != prod(entry.size):
        raise RunError(Problem("checkpoint", folder, f"parts of {key} were not saved: merge another step"))
    return Stored(shape, dtype, tuple(extents), width)
