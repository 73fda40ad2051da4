"""Copies of training's state in host memory, pinned where a GPU fills them, so that training goes on while they are written."""

import mmap
import threading
import weakref
from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from jobs.distributed.host_memory import free_bytes
from jobs.distributed.process_group import World

SPARE = 1.2
"""What must be free for each byte that is copied: DeepSpeed's rank 0 also has the weights of compute, and files their headers."""
SMALLEST, LARGEST, ALIGNED = 2**22, 2**30, 4096
"""Bytes that are taken at once, twice as many each time, and where a copy begins."""
PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


class Slabs:
    """Host memory for copies, taken a slab at a time, in huge pages where the kernel has them, and pinned as a whole: page by
    page, as of a plain allocation, that takes half a minute for 48 GB. It is never given back."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._slab = mmap.mmap(-1, 1)
        self._used = 1
        self._free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)

    def room_for(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """As much host memory as `storage` has; another may have it once that is gone."""
        size = storage.size()
        held = self._free[size].pop() if self._free[size] else self._taken(size)
        weakref.finalize(storage, self._free[size].append, held).atexit = False
        return held

    def prepare(self, sizes: list[int]) -> None:
        """Take what `room_for` will be asked for."""
        for size in sizes:
            self._free[size].append(self._taken(size))

    def _taken(self, size: int) -> torch.UntypedStorage:
        begin = -(-self._used // ALIGNED) * ALIGNED
        if begin + size > len(self._slab):
            wanted = min(LARGEST, max(SMALLEST, 2 * len(self._slab)))
            if size > wanted // 2:  # a slab of its own, so that the rest of this one is not lost
                return torch.frombuffer(self._mapped(size), dtype=torch.uint8).untyped_storage()
            begin, self._slab = 0, self._mapped(wanted)
        self._used = begin + size
        return torch.frombuffer(self._slab, dtype=torch.uint8, count=size, offset=begin).untyped_storage()

    def _mapped(self, size: int) -> mmap.mmap:
        made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            made.madvise(mmap.MADV_HUGEPAGE)
        every = torch.frombuffer(made, dtype=torch.uint8)
        every.zero_()  # by all threads: pinning would touch its pages by one
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(every.data_ptr(), size, PORTABLE))
        return made


class _Keeping(StateDictStager):
    """torch's, which knows every kind of tensor, on memory of ours. torch 2.11's DefaultStager forgets it after every copy."""

    def __init__(self, slabs: Slabs) -> None:
        super().__init__(pin_memory=False, share_memory=False)
        self._slabs = slabs

    def _stage_untyped_storage(self, storage: torch.UntypedStorage, non_blocking: bool = False) -> torch.UntypedStorage:
        if storage.size() and storage not in self._cached_storage_mapping:
            self._cached_storage_mapping[storage] = self._slabs.room_for(storage)
        return super()._stage_untyped_storage(storage, non_blocking)  # type: ignore[no-any-return]


class Stager:
    """Host buffers of one rank, kept from one checkpoint to the next: taking them costs more than copying."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._slabs = Slabs(pinned=self._cuda)
        self._stager = _Keeping(self._slabs)
        self._taking: threading.Thread | None = None

    def prepare(self, sizes: list[int]) -> None:
        """Begin to take host memory for copies of storages of these sizes, while training goes on."""

        def take() -> None:
            if self._cuda:
                torch.cuda.set_device(self._device)  # a thread begins on the first GPU, and would open it too
            self._slabs.prepare(sizes)

        self._taking = threading.Thread(target=take, name="host-memory", daemon=True)
        self._taking.start()

    def prepared(self) -> None:
        """Wait until what was begun is done."""
        if self._taking:
            self._taking.join()

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of what DCP saves, once it is complete: the next step changes the weights in place."""
        self.prepared()
        copied: dict[str, Any] = self._stager.stage(state, non_blocking=self._cuda)
        if self._cuda:
            torch.cuda.synchronize()
        return copied

    def tree(self, value: Any) -> Any:
        """A copy of what torch.save is given, which pickles to the same bytes: one storage under several tensors stays one.

        Only tensors and the containers around them are copied. Torch's own stager would follow the attributes of tensors
        into DeepSpeed's process groups, and in 2.11 copies a storage once for each tensor on it.
        """
        storages: dict[int, torch.Tensor] = {}
        collect(value, storages)
        return _rebuilt(value, self.state({"storages": storages})["storages"], {})


def collect(value: Any, storages: dict[int, torch.Tensor]) -> None:
    """Add the storages under all tensors of what torch.save is given, by their identity, each once."""
    if isinstance(value, torch.Tensor):
        held = value.untyped_storage()
        storages.setdefault(held._cdata, torch.empty(0, dtype=torch.uint8, device=value.device).set_(held))
        collect(vars(value), storages)
    elif isinstance(value, dict):
        collect(list(value.values()), storages)
        collect(vars(value) if type(value) is not dict else None, storages)
    elif type(value) in (list, tuple):
        for item in value:
            collect(item, storages)


def _rebuilt(value: Any, storages: dict[int, torch.Tensor], made: dict[int, Any]) -> Any:
    """`made`: copies by the id of what they were made of; what stood in two places is one object there again."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, torch.Tensor):
        made[id(value)] = _tensor(value, storages[value.untyped_storage()._cdata])
        vars(made[id(value)]).update(_rebuilt(vars(value), storages, made))
    elif isinstance(value, dict):
        made[id(value)] = found = type(value)()
        found.update({key: _rebuilt(item, storages, made) for key, item in value.items()})
        if type(value) is not dict:  # a module's state has its version as an attribute
            vars(found).update(_rebuilt(vars(value), storages, made))
    elif type(value) is list:
        made[id(value)] = found = []
        found.extend(_rebuilt(item, storages, made) for item in value)
    elif type(value) is tuple:
        made[id(value)] = tuple(_rebuilt(item, storages, made) for item in value)
    return made.get(id(value), value)


def _tensor(value: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(0, dtype=value.dtype)
    copy.set_(host.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if isinstance(value, nn.Parameter):
        return nn.Parameter(copy, value.requires_grad)
    return copy.requires_grad_(value.requires_grad)


def fits(rank_bytes: int, world: World) -> bool:
    """Whether every node has room in host memory for a copy of `rank_bytes` by each of its ranks. All ranks call this."""
    free = torch.tensor(float(free_bytes() >= SPARE * rank_bytes * world.local_size))
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return bool(free)
