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
from typing import Any, NamedTuple

from conf.errors import Problem, RunError
from jobs.tensor_io import pickle_opcodes
from jobs.tensor_io.dtypes import STORAGES, TORCH, Dtype
from jobs.tensor_io.untrusted import refused_if_damaged


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


class Storage(NamedTuple):
    """The numbers of one or more tensors in a torch.save archive."""

    dtype: Any
    """A Dtype, or Inert for one that is not known."""
    offset: int
    nbytes: int


class Callback(NamedTuple):
    """A function that a pickle may call. It is a tuple because a pickle may also set the attributes of a function."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


_ARCHIVE_CLASSES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    ("torch._tensor", "_rebuild_from_type_v2"): Callback(lambda build, _, arguments, __: build(*arguments)),
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


def _rebuild_tensor(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> SavedTensor:
    """Does the work of torch._utils._rebuild_tensor and its newer versions; `storage` comes from `persistent_load`.

    Raises UnpicklingError for a tensor that is not inside its storage: the numbers of others follow there.
    """
    dtype, start, nbytes = storage
    if len(rest) > 2 and isinstance(rest[2], Dtype):  # version 3 passes the dtype: newer dtypes have untyped storages
        dtype = rest[2]
    itemsize = dtype.itemsize if isinstance(dtype, Dtype) else 0
    shape, stride = tuple(shape), tuple(stride)
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor has a shape that cannot be")
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else -1
    if (offset + last + 1) * itemsize > nbytes:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return SavedTensor(start + offset * itemsize, dtype, shape, _is_contiguous(shape, stride))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


_REBUILD_FUNCTIONS = {
    "_rebuild_tensor": Callback(_rebuild_tensor),
    "_rebuild_tensor_v2": Callback(_rebuild_tensor),
    "_rebuild_tensor_v3": Callback(_rebuild_tensor),
    "_rebuild_parameter": Callback(lambda data, *_: data),
    "_rebuild_parameter_with_state": Callback(lambda data, *_: data),
}


class SafeUnpickler(pickle.Unpickler):
    """Builds only the classes listed in this file, and `Inert` for all others: a pickle cannot call anything else."""

    def __init__(
        self, data: bytes, classes: dict[tuple[str, str], Any], find_storage: Callable[[str], tuple[int, int]]
    ) -> None:
        """`find_storage` gives the offset and the bytes of a storage by its key. Raises UnpicklingError for a harmful pickle."""
        pickle_opcodes.check(data)
        super().__init__(io.BytesIO(data))
        self.classes, self.find_storage = classes, find_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.classes:
            return self.classes[module, name]
        if module == "torch" and name in TORCH:
            return TORCH[name]
        if name in STORAGES and module in ("torch", "torch.storage"):
            return STORAGES[name]
        if module == "torch._utils" and name in _REBUILD_FUNCTIONS:
            return _REBUILD_FUNCTIONS[name]
        return Inert

    def persistent_load(self, pid: Any) -> Storage:
        """torch.save refers to a storage by ("storage", class, key, device, numel)."""
        _, dtype, key, _, _ = pid
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage has no name")
        return Storage(dtype, *self.find_storage(key))


def load_dcp_metadata(path: Path) -> Metadata:
    """The `.metadata` file of a DCP folder. Raises RunError if it is missing, damaged or something else."""
    if not path.is_file():
        raise RunError(Problem("checkpoint", path, "is missing: the checkpoint was not written completely"))
    with refused_if_damaged(path):
        metadata = SafeUnpickler(path.read_bytes(), _ARCHIVE_CLASSES | _DCP_CLASSES, lambda _: (0, 0)).load()
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
    # a small buffer: only the pickle is read, which is a few KB among gigabytes of numbers
    with (
        refused_if_damaged(path, "is cut short or damaged"),
        zipfile.ZipFile(io.BufferedReader(_FileWindow(descriptor, offset, length), 4096)) as files,
    ):
        records = {name.partition("/")[2]: name for name in files.namelist()}
        if len(records) < len(files.namelist()):
            raise zipfile.BadZipFile("a record is there twice")

        def find_storage(key: str) -> tuple[int, int]:
            info = _stored(files, records.get(f"data/{key}"), length)
            # the data follows the local header, whose two variable lengths are at byte 26
            header = os.pread(descriptor, 30, offset + info.header_offset)
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            begin = info.header_offset + 30 + name_length + extra_length
            if begin + info.file_size > length:
                raise zipfile.BadZipFile("a storage is longer than the file")
            return offset + begin, info.file_size

        pickled = files.read(_stored(files, records.get("data.pkl"), length))
        return SafeUnpickler(pickled, _ARCHIVE_CLASSES, find_storage).load()


def _stored(files: zipfile.ZipFile, name: str | None, length: int) -> zipfile.ZipInfo:
    """The entry of a record. torch.save compresses none, so what is larger than the archive is not from there."""
    if name is None:
        raise zipfile.BadZipFile("a record is missing")
    info = files.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > length:
        raise zipfile.BadZipFile("a record is compressed")
    return info
