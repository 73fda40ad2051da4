"""launcher/supervise/error_classes.py: status and remedy of an exception, by its type and message."""

import errno
import re
from functools import reduce

import pytest

from launcher.check import command_line
from launcher.supervise.error_classes import ERROR_CLASSES, classify
from tests.conftest import ROOT, Compose

OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
DistBackendError = type("DistBackendError", (RuntimeError,), {})
SafetensorError = type("SafetensorError", (Exception,), {})
"""Exceptions with the names of torch's: error_classes does not import torch."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: Out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "bad_node"),
        (RuntimeError("NVRM: Xid 79, GPU has fallen off the bus"), "bad_node"),
        (DistBackendError("the store went away"), "nccl"),
        (RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"), "bad_node"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "bad_node"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"), "nccl"),
        (RuntimeError("Watchdog caught collective operation timeout in ProcessGroupNCCL"), "nccl"),
        (DistBackendError("NCCL error: CUDA out of memory"), "out_of_memory"),
        (DistBackendError("NCCL error: uncorrectable ECC error encountered"), "bad_node"),
        (DistBackendError("Error while creating shared memory segment /dev/shm/nccl-aZ: No space left"), "user_error"),
        (RuntimeError("CUDA error: device-side assert triggered"), "failed"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "failed"),
        (OSError(errno.ENOSPC, "No space left on device"), "user_error"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "user_error"),
        (OSError(errno.EDQUOT, "Le quota est atteint"), "user_error"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "user_error"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (OSError(errno.EIO, "Input/output error"), "failed"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/rows"), "user_error"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/rows"), "user_error"),
        (ModuleNotFoundError("No module named 'deepspeed'"), "user_error"),
        (RuntimeError("Connection closed by peer [10.0.0.1]:2044"), "failed"),
        (ValueError("loss is nan at step 7"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
    ids=lambda value: str(value)[:40] or type(value).__name__,
)
def test_an_exception_has_the_right_status(error: BaseException, status: str) -> None:
    assert classify(error)[0] == status


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OutOfMemoryError("CUDA out of memory"), "train.micro_batch"),
        (MemoryError(), "memory_gib"),
        (OSError(errno.ENOSPC, "No space left on device"), "free space"),
        (DistBackendError("creating shared memory segment /dev/shm/nccl-aZ: No space left"), "enlarge it"),
        (RuntimeError("uncorrectable ECC error"), "cluster.train.exclude"),
        (RuntimeError("device-side assert triggered"), "token id"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "every node"),
        (ModuleNotFoundError("No module named 'deepspeed'"), "cluster.python"),
        (DistBackendError("timeout"), "preflight"),
        (FloatingPointError("loss nan"), "learning_rate"),
        (ValueError("anything else"), ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_each_error_class_has_a_remedy(error: BaseException, remedy: str) -> None:
    text = classify(error)[1]
    assert remedy in text
    assert bool(text) is bool(remedy)


def raised(error: BaseException, cause: BaseException | None, handled: BaseException | None = None) -> BaseException:
    """Return an exception as raised by `raise ... from cause`, while `handled` was being handled."""
    error.__cause__, error.__context__ = cause, handled
    return error


def test_the_cause_of_an_exception_counts_but_its_context_does_not() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert classify(raised(RuntimeError("could not save"), raised(ValueError("part 7"), full)))[0] == "user_error"
    assert classify(raised(RuntimeError("could not save"), None, ImportError("no flash_attn")))[0] == "failed"


REMEDIES = " ; ".join(item.remedy for item in ERROR_CLASSES)
SETTINGS = sorted(set(re.findall(r"\b[a-z][\w.]*=[\w.]+", REMEDIES)))
KEYS = sorted(set(re.findall(r"\b(?:train|data|cluster)\.[a-z][\w.]*(?=[ ,;)])", REMEDIES)))


@pytest.mark.parametrize("word", SETTINGS)
def test_a_setting_that_a_remedy_names_can_be_typed(word: str) -> None:
    assert command_line.problems([word], ROOT / "conf", {}) == []


def test_a_key_that_a_remedy_names_exists(compose: Compose) -> None:
    config = compose("cluster=slurm")
    assert {"data.max_length", "cluster.network.interface", "cluster.container.mounts"} <= set(KEYS)
    for key in KEYS:
        reduce(getattr, key.split("."), config)


def test_less_memory_is_named_in_the_order_in_which_it_costs() -> None:
    remedy = classify(OutOfMemoryError("CUDA out of memory"))[1]
    names = ["micro_batch", "max_length", "qlora", "offload", "stage3_max_live_parameters"]
    places = [remedy.index(name) for name in names]
    assert places == sorted(places)
