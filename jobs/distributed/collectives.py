"""What all ranks must see alike: one rank's answer for all, or one rank's error on all, so that none waits for a rank that left."""

import errno
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from conf.errors import UserError

T = TypeVar("T")


class OtherRankError(OSError):
    """An OSError that another rank met; that rank has it with its traceback."""


def first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; its UserError too. Another rank may see an older state of the file system."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [_tried(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return _got(*box[0])


def everywhere(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it went well on all; the first UserError of any rank on all of them."""
    value, error = _tried(work)
    if dist.is_initialized():
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = next((found for found in errors if found), None)
    return _got(value, error)


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gives on each rank, once it went well on all. The first UserError of any rank is raised on all of them;
    an OSError on the rank that it hit, and as OtherRankError, with that rank's name, on the others.
    """
    failed: OSError | None = None
    value, error = None, None
    try:
        value, error = _tried(work)
    except OSError as found:
        failed = found
    if not dist.is_initialized():
        if failed:
            raise failed
        return [_got(value, error)]
    told = failed and (failed.errno or errno.EIO, f"rank {dist.get_rank()} on {socket.gethostname()}: {failed}")
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, (value, error, told))
    if failed:
        raise failed
    for _, problem, _ in box:
        _got(None, problem)
    for _, _, said in box:
        if said:
            raise OtherRankError(*said)
    return [value for value, _, _ in box]


def _tried(work: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return work(), None
    except UserError as error:
        return None, error


def _got(value: Any, error: UserError | None) -> Any:
    if error is not None:
        raise error
    return value
