"""Reads the pickles of torch.save and DCP without running any code that they name; tensors become byte ranges of the file."""

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from jobs.tensor_io.dtypes import STORAGES, TORCH, Dtype


class Inert:
    """Replaces every class that is not listed here: it accepts whatever a pickle gives it, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a torch.save archive: where its bytes are in the file. They are not read."""

    offset: int
    dtype: Dtype
    shape: tuple[int, ...]
    contiguous: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Record:
    """Replaces a data class of DCP: just its pickled fields. Importing torch for the real one takes seconds."""

    def __setstate__(self, state: Any) -> None:
        fields = state if isinstance(state, dict) else {"state": state}
        self.__dict__.update(fields)


class TensorMetadata(Record):
    """TensorStorageMetadata of DCP."""

    properties: Any
    size: tuple[int, ...]
    chunks: list[Any]
    """Each with `offsets` and `sizes`."""


class Metadata(Record):
    """Metadata of DCP."""

    state_dict_metadata: dict[str, Any]
    """Key -> TensorMetadata, or Record for what is not a tensor."""
    storage_data: dict[Any, Any]
    """MetadataIndex (`fqn`, `offset`) -> _StorageInfo (`relative_path`, `offset`, `length`)."""


_ARCHIVE_CLASSES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, _, arguments, __: build(*arguments),
}
_DCP_CLASSES: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): Metadata,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): TensorMetadata,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
} | {
    (f"torch.distributed.checkpoint.{module}", name): Record
    for module, name in (
        ("metadata", "BytesStorageMetadata"),
        ("metadata", "ChunkStorageMetadata"),
        ("metadata", "TensorProperties"),
        ("metadata", "MetadataIndex"),
        ("metadata", "StorageMeta"),
        ("filesystem", "_StorageInfo"),
        ("filesystem", "_StoragePrefix"),
    )
}


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> SavedTensor:
    """Does the work of torch._utils._rebuild_tensor and its newer versions; `storage` comes from `persistent_load`."""
    dtype, start = storage
    if len(rest) > 2 and isinstance(rest[2], Dtype):  # version 3 passes the dtype: newer dtypes have untyped storages
        dtype = rest[2]
    itemsize = dtype.itemsize if isinstance(dtype, Dtype) else 0
    return SavedTensor(start + offset * itemsize, dtype, tuple(shape), _is_contiguous(tuple(shape), tuple(stride)))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


_REBUILD_FUNCTIONS: dict[str, Any] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor,
    "_rebuild_parameter": lambda data, *_: data,
    "_rebuild_parameter_with_state": lambda data, *_: data,
}


class SafeUnpickler(pickle.Unpickler):
    """Builds only the classes listed in this file, and `Inert` for all others: a pickle cannot call anything else."""

    def __init__(
        self, file: io.BytesIO, classes: dict[tuple[str, str], Any], storage_offset: Callable[[str], int]
    ) -> None:
        super().__init__(file)
        self.classes, self.storage_offset = classes, storage_offset

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.classes:
            return self.classes[module, name]
        if module == "torch" and name in TORCH:
            return TORCH[name]
        if name in STORAGES and module in ("torch", "torch.storage"):
            return STORAGES[name]
        if module == "torch._utils" and name in _REBUILD_FUNCTIONS:
            return _REBUILD_FUNCTIONS[name]
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """torch.save refers to a storage by ("storage", class, key, device, numel). Returns its dtype and offset in the file."""
        _, dtype, key, _, _ = pid
        return dtype, self.storage_offset(key)


def load_dcp_metadata(path: Path) -> Metadata:
    """The `.metadata` file of a DCP folder. Raises RunError if it is missing, damaged or something else."""
    try:
        unpickler = SafeUnpickler(io.BytesIO(path.read_bytes()), _ARCHIVE_CLASSES | _DCP_CLASSES, lambda _: 0)
        metadata = unpickler.load()
    except FileNotFoundError:
        raise RunError(Problem("checkpoint", path, "is missing: the checkpoint was not written completely")) from None
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise RunError(Problem("checkpoint", path, f"cannot be read, it is damaged: {error}")) from error
    if not isinstance(metadata, Metadata):
        raise RunError(Problem("checkpoint", path, "is not the metadata of a distributed checkpoint"))
    return metadata


class _FileWindow(io.RawIOBase):
    """A range of a file, read as if it were a file: DCP puts many torch.save archives into one."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)[: max(0, self.length - self.position)]
        count = os.preadv(self.descriptor, [target], self.offset + self.position)
        self.position += count
        return count


def load_archive(descriptor: int, path: str, offset: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote into `length` bytes at `offset` of a file, with a SavedTensor for every tensor.

    Raises RunError if it is cut short or damaged.
    """
    length = os.fstat(descriptor).st_size if length is None else length
    try:
        # a small buffer: only the pickle is read, which is a few KB among gigabytes of numbers
        with zipfile.ZipFile(io.BufferedReader(_FileWindow(descriptor, offset, length), 4096)) as files:
            records = {name.partition("/")[2]: name for name in files.namelist()}

            def storage_offset(key: str) -> int:
                info = files.getinfo(records[f"data/{key}"])
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("a storage is compressed")
                # the data follows the local header, whose two variable lengths are at byte 26
                header = os.pread(descriptor, 30, offset + info.header_offset)
                name_length, extra_length = struct.unpack("<HH", header[26:30])
                return int(offset + info.header_offset + 30 + name_length + extra_length)

            pickled = io.BytesIO(files.read(records["data.pkl"]))
            return SafeUnpickler(pickled, _ARCHIVE_CLASSES, storage_offset).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        struct.error,
        TypeError,
    ) as error:
        message = f"is cut short or damaged ({error}): go back to the checkpoint before"
        raise RunError(Problem("checkpoint", path, message)) from error
