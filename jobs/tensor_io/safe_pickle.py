"""Reads what torch.save and DCP have pickled without running any of it: storages stay where they are, as byte ranges."""

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
from jobs.tensor_io.dtypes import EVERY, Dtype


class Inert:
    """Stands for every class that is not known here: takes what a pickle gives it, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


@dataclass(frozen=True)
class Saved:
    """A tensor in a torch.save archive: bytes of the file, read by nobody yet."""

    offset: int
    dtype: Dtype
    shape: tuple[int, ...]
    contiguous: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)


DTYPES = {
    "FloatStorage": EVERY["float32"],
    "DoubleStorage": EVERY["float64"],
    "HalfStorage": EVERY["float16"],
    "BFloat16Storage": EVERY["bfloat16"],
    "LongStorage": EVERY["int64"],
    "IntStorage": EVERY["int32"],
    "ShortStorage": EVERY["int16"],
    "CharStorage": EVERY["int8"],
    "ByteStorage": EVERY["uint8"],
    "BoolStorage": EVERY["bool"],
}
PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, _, arguments, __: build(*arguments),
}


class Record:
    """Stands for a data class of DCP: the fields that were pickled. Importing torch's own takes seconds."""

    def __setstate__(self, state: Any) -> None:
        fields = state if isinstance(state, dict) else {"state": state}
        self.__dict__.update(fields)


class Tensor(Record):
    """TensorStorageMetadata: `properties`, `size`, `chunks`."""


class Metadata(Record):
    """`state_dict_metadata`, `storage_data`, ..."""


METADATA: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): Metadata,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): Tensor,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
} | {
    (f"torch.distributed.checkpoint.{place.rpartition('.')[0]}", place.rpartition(".")[2]): Record
    for place in (
        "metadata.BytesStorageMetadata", "metadata.ChunkStorageMetadata", "metadata.TensorProperties",
        "metadata.MetadataIndex", "metadata.StorageMeta", "filesystem._StorageInfo", "filesystem._StoragePrefix",
    )
}  # fmt: skip


class Reader(pickle.Unpickler):
    """Builds the classes named here and inert stand-ins of all others, so that no pickle can call anything."""

    def __init__(self, file: io.BytesIO, known: dict[tuple[str, str], Any], storage: Callable[[str], int]) -> None:
        super().__init__(file)
        self.known, self.storage = known, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and name in EVERY:
            return EVERY[name]
        if name in DTYPES and module in ("torch", "torch.storage"):
            return DTYPES[name]
        if module == "torch._utils" and name in REBUILDS:
            return REBUILDS[name]
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        return dtype, self.storage(key)


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Saved:
    dtype, start = storage
    if len(rest) > 2 and isinstance(rest[2], Dtype):  # newer dtypes lie in untyped storages
        dtype = rest[2]
    itemsize = dtype.itemsize if isinstance(dtype, Dtype) else 0
    return Saved(start + offset * itemsize, dtype, tuple(shape), _contiguous(tuple(shape), tuple(stride)))


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


REBUILDS: dict[str, Any] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor,
    "_rebuild_parameter": lambda data, *_: data,
    "_rebuild_parameter_with_state": lambda data, *_: data,
}


def dcp_metadata(path: Path) -> Metadata:
    """A DCP folder's `.metadata`. Raises RunError where it is not one."""
    try:
        found = Reader(io.BytesIO(path.read_bytes()), PLAIN | METADATA, lambda _: 0).load()
    except FileNotFoundError:
        raise RunError(Problem("checkpoint", path, "is missing: the checkpoint was not written to its end")) from None
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise RunError(Problem("checkpoint", path, f"cannot be read, it is damaged: {error}")) from error
    if not isinstance(found, Metadata):
        raise RunError(Problem("checkpoint", path, "is not the metadata of a distributed checkpoint"))
    return found


class Window(io.RawIOBase):
    """Some bytes of a file as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self.descriptor, [memoryview(buffer)[: max(0, self.length - self.at)]], self.offset + self.at)
        self.at += count
        return count


def archive(descriptor: int, path: str, offset: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote, `length` bytes at `offset` of a file, with every tensor as Saved.

    Raises RunError where the file is cut short or damaged.
    """
    length = os.fstat(descriptor).st_size if length is None else length
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(descriptor, offset, length), 4096)) as files:
            records = {name.partition("/")[2]: name for name in files.namelist()}

            def storage(key: str) -> int:
                info = files.getinfo(records[f"data/{key}"])
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("a storage is compressed")
                header = os.pread(descriptor, 30, offset + info.header_offset)
                name, extra = struct.unpack("<HH", header[26:30])
                return offset + info.header_offset + 30 + name + extra

            return Reader(io.BytesIO(files.read(records["data.pkl"])), PLAIN, storage).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        struct.error,
        TypeError,
    ) as error:
        raise RunError(
            Problem("checkpoint", path, f"is cut short or damaged ({error}): go back to the checkpoint before")
        ) from error
