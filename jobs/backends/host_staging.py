"""Copies training's state to host memory (pinned, if it is on a GPU), so that training can go on while the copy is written."""

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
"""Bytes that must be free for each byte copied: DeepSpeed's rank 0 also saves the compute weights, and files have headers."""
SMALLEST_SLAB, LARGEST_SLAB, ALIGNMENT = 2**22, 2**30, 4096
"""Bytes. Each slab is twice as large as the one before, within these limits; every copy begins at a multiple of ALIGNMENT."""
PORTABLE = 1
"""cudaHostRegisterPortable: the memory counts as pinned in every CUDA context of the process."""


class SlabAllocator:
    """Allocates host memory for copies in large slabs, with huge pages if the kernel has them, and pins each slab as a whole.

    Pinning a plain allocation page by page takes half a minute for 48 GB. The memory is never freed.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._slab = mmap.mmap(-1, 1)
        self._used = 1
        self._free: dict[int, list[torch.UntypedStorage]] = defaultdict(list)

    def allocate(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Host memory of the size of `storage`. When `storage` is freed, the memory is used for another one of that size."""
        size = storage.size()
        memory = self._free[size].pop() if self._free[size] else self._new(size)
        weakref.finalize(storage, self._free[size].append, memory).atexit = False
        return memory

    def prepare(self, sizes: list[int]) -> None:
        """Allocate memory for later calls of `allocate` with these sizes (bytes)."""
        for size in sizes:
            self._free[size].append(self._new(size))

    def _new(self, size: int) -> torch.UntypedStorage:
        begin = -(-self._used // ALIGNMENT) * ALIGNMENT
        if begin + size > len(self._slab):
            next_slab = min(LARGEST_SLAB, max(SMALLEST_SLAB, 2 * len(self._slab)))
            if size > next_slab // 2:  # a slab of its own, so that the rest of this one is not lost
                return torch.frombuffer(self._map_slab(size), dtype=torch.uint8).untyped_storage()
            begin, self._slab = 0, self._map_slab(next_slab)
        self._used = begin + size
        return torch.frombuffer(self._slab, dtype=torch.uint8, count=size, offset=begin).untyped_storage()

    def _map_slab(self, size: int) -> mmap.mmap:
        slab = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # the kernel has no huge pages
            slab.madvise(mmap.MADV_HUGEPAGE)
        pages = torch.frombuffer(slab, dtype=torch.uint8)
        pages.zero_()  # touches the pages with all threads; pinning would touch them with one
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), size, PORTABLE))
        return slab


class _SlabStager(StateDictStager):
    """torch's stager, which knows every kind of tensor, with memory from SlabAllocator.

    torch 2.11's DefaultStager drops its memory after each copy.
    """

    def __init__(self, slabs: SlabAllocator) -> None:
        super().__init__(pin_memory=False, share_memory=False)
        self._slabs = slabs

    def _stage_untyped_storage(self, storage: torch.UntypedStorage, non_blocking: bool = False) -> torch.UntypedStorage:
        if storage.size() and storage not in self._cached_storage_mapping:
            self._cached_storage_mapping[storage] = self._slabs.allocate(storage)
        staged: torch.UntypedStorage = super()._stage_untyped_storage(storage, non_blocking)
        return staged


class Stager:
    """Host buffers of one rank. They are kept from one checkpoint to the next: allocating them takes longer than copying."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._slabs = SlabAllocator(pinned=self._cuda)
        self._stager = _SlabStager(self._slabs)
        self._preparing: threading.Thread | None = None

    def prepare(self, sizes: list[int]) -> None:
        """Start a thread that allocates host memory for storages of these sizes (bytes), while training goes on."""

        def allocate() -> None:
            if self._cuda:
                torch.cuda.set_device(self._device)  # a new thread uses GPU 0, and would create a CUDA context there
            self._slabs.prepare(sizes)

        self._preparing = threading.Thread(target=allocate, name="host-memory", daemon=True)
        self._preparing.start()

    def wait_prepared(self) -> None:
        """Wait for the thread of `prepare`, if there is one."""
        if self._preparing:
            self._preparing.join()

    def copy_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """A complete copy of a state dict for DCP. It waits for the copy, because the next step changes the weights in place."""
        self.wait_prepared()
        copied: dict[str, Any] = self._stager.stage(state, non_blocking=self._cuda)
        if self._cuda:
            torch.cuda.synchronize()
        return copied

    def copy_object(self, value: Any) -> Any:
        """A copy of an object for torch.save, which pickles to the same bytes: tensors that share a storage share one in the copy.

        Only tensors and the containers around them are copied. Torch's own stager would follow attributes of tensors into
        DeepSpeed's process groups, and torch 2.11's copies a storage once for each tensor on it.
        """
        storages: dict[int, torch.Tensor] = {}
        collect_storages(value, storages)
        return _rebuild(value, self.copy_state_dict({"storages": storages})["storages"], {})


def collect_storages(value: Any, storages: dict[int, torch.Tensor]) -> None:
    """Add the storage of every tensor in an object for torch.save to `storages`, once each: address -> its bytes as a tensor."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        storages.setdefault(storage._cdata, torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage))
        collect_storages(vars(value), storages)
    elif isinstance(value, dict):
        collect_storages(list(value.values()), storages)
        collect_storages(vars(value) if type(value) is not dict else None, storages)
    elif type(value) in (list, tuple):
        for item in value:
            collect_storages(item, storages)


def _rebuild(value: Any, storages: dict[int, torch.Tensor], copies: dict[int, Any]) -> Any:
    """Copy `value` onto the host storages.

    `copies` has every copy made so far, by the id of its original: an object that occurs twice is one object in the copy, too.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, torch.Tensor):
        return _rebuild_tensor(value, storages, copies)
    if isinstance(value, dict):
        return _rebuild_dict(value, storages, copies)
    if type(value) is list:
        items: list[Any] = []
        copies[id(value)] = items  # before its items, which may refer to it
        items.extend(_rebuild(item, storages, copies) for item in value)
    elif type(value) is tuple:
        copies[id(value)] = tuple(_rebuild(item, storages, copies) for item in value)
    return copies.get(id(value), value)


def _rebuild_tensor(value: torch.Tensor, storages: dict[int, torch.Tensor], copies: dict[int, Any]) -> torch.Tensor:
    host = storages[value.untyped_storage()._cdata]
    copy = torch.empty(0, dtype=value.dtype)
    copy.set_(host.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if isinstance(value, nn.Parameter):
        copy = nn.Parameter(copy, value.requires_grad)
    else:
        copy.requires_grad_(value.requires_grad)
    copies[id(value)] = copy  # before its attributes, which may refer to it
    vars(copy).update(_rebuild(vars(value), storages, copies))
    return copy


def _rebuild_dict(value: dict[Any, Any], storages: dict[int, torch.Tensor], copies: dict[int, Any]) -> dict[Any, Any]:
    copies[id(value)] = copy = type(value)()
    copy.update({key: _rebuild(item, storages, copies) for key, item in value.items()})
    if type(value) is not dict:  # the state_dict of a module has its version as an attribute
        vars(copy).update(_rebuild(vars(value), storages, copies))
    return copy


def fits_in_host_memory(rank_bytes: int, world: World) -> bool:
    """Whether every node has SPARE * `rank_bytes` of free host memory for each of its ranks. Collective: all ranks call this."""
    free = torch.tensor(float(free_bytes() >= SPARE * rank_bytes * world.local_size))
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return bool(free)
