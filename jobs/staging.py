"""Copies of training's state in host memory, pinned where a GPU fills them, so that training goes on while they are written."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from jobs.distributed import World

SPARE = 1.2
"""What must be free for each byte that is copied: DeepSpeed's rank 0 also has the weights of compute, and files their headers."""
CGROUPS = Path("/sys/fs/cgroup")


class Stager:
    """Host buffers of one rank, kept from one checkpoint to the next: pinning takes longer than copying."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,  # the next step changes the weights in place: it has to wait
                use_non_blocking_copy=cuda,
            )
        )

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of what DCP saves, once it is complete."""
        copied: dict[str, Any] = self._stager.stage(state)
        return copied

    def tree(self, value: Any) -> Any:
        """A copy of what torch.save is given, which pickles to the same bytes: one storage under several tensors stays one.

        Only tensors and the containers around them are copied. Torch's own stager would follow the attributes of tensors
        into DeepSpeed's process groups, and in 2.11 copies a storage once for each tensor on it.
        """
        storages: dict[int, torch.Tensor] = {}
        _collect(value, storages)
        return _rebuilt(value, self.state({"storages": storages})["storages"], {})


def _collect(value: Any, storages: dict[int, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        held = value.untyped_storage()
        storages.setdefault(held._cdata, torch.empty(0, dtype=torch.uint8, device=value.device).set_(held))
        _collect(vars(value), storages)
    elif isinstance(value, dict):
        _collect(list(value.values()), storages)
        _collect(vars(value) if type(value) is not dict else None, storages)
    elif type(value) in (list, tuple):
        for item in value:
            _collect(item, storages)


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


def free_bytes() -> int:
    """Host memory that this process may still take: of the machine, and of each control group that it is in."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    found = [int(lines["MemAvailable"].split()[0]) * 1024]
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    place = CGROUPS / own.lstrip("/")
    for group in (place, *place.parents):
        try:
            limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(int(limit) - int(used) + int(stat["inactive_file"]))  # pages that are given back when needed
        except (OSError, ValueError):  # the root has no such files, and a group without a limit says `max`
            continue
    return min(found)
