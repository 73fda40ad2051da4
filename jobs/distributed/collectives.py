"""Collective helpers: send rank 0's result to all ranks, or raise one rank's error on all of them.

If only the failing rank left, the others would wait for it in the next collective until a time-out. All ranks must call these
functions, in the same order. Without a process group they only call their argument, so the same code also runs in one process.
"""

import errno
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from conf.errors import UserError

T = TypeVar("T")


class OtherRankError(OSError):
    """An OSError that happened on another rank. That rank raises the original error, with its traceback."""


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 only; return its result on every rank, or raise its UserError on every rank.

    Use it for decisions that depend on the file system: another node may still see an older state of a network file system.
    """
    if not dist.is_initialized():
        return work()
    results: list[Any] = [_result_or_user_error(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(results)
    value, error = results[0]
    return cast(T, _value_or_raise(value, error))


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return this rank's own result. The first UserError of any rank is raised on all ranks."""
    value, error = _result_or_user_error(work)
    if dist.is_initialized():
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = next((other for other in errors if other), None)
    return cast(T, _value_or_raise(value, error))


def gather(work: Callable[[], T]) -> list[T]:
    """Call `work` on every rank and return the results of all ranks, in rank order, on every rank.

    The first UserError of any rank is raised on all ranks. An OSError is raised on the rank where it happened; the others raise
    OtherRankError, with that rank's number and host in its text.
    """
    os_error: OSError | None = None
    value, user_error = None, None
    try:
        value, user_error = _result_or_user_error(work)
    except OSError as error:
        os_error = error
    if not dist.is_initialized():
        if os_error:
            raise os_error
        return [_value_or_raise(value, user_error)]
    # The number and the text: the error itself may hold objects that cannot be pickled
    sent = os_error and (os_error.errno or errno.EIO, f"rank {dist.get_rank()} on {socket.gethostname()}: {os_error}")
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (value, user_error, sent))
    if os_error:
        raise os_error
    for _, error_of_rank, _ in results:
        _value_or_raise(None, error_of_rank)
    for _, _, received in results:
        if received:
            raise OtherRankError(*received)
    return [value for value, _, _ in results]


def barrier() -> None:
    """Wait until all ranks have come here."""
    gather(lambda: None)


def _result_or_user_error(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except UserError as error:
        return None, error


def _value_or_raise(value: Any, error: UserError | None) -> Any:
    if error is not None:
        raise error
    return value
