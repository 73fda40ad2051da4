"""launcher/supervise/error_classes.py classifies the exceptions that torch, the Hub's client and the kernel really raise."""

import errno
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from transformers import AutoConfig

from conf.schema import Config
from jobs.distributed import process_group
from launcher.supervise.error_classes import classify
from tests.conftest import Compose

ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)
"""The type of CUDA's own errors; RuntimeError in versions of torch without it."""


def full() -> None:
    # "w" would create a file on systems without this device
    with Path("/dev/full").open("r+b", buffering=0) as file:
        file.write(b"x")


def rendezvous() -> None:
    dist.TCPStore("127.0.0.1", 1, 2, is_master=False, timeout=timedelta(seconds=1))


def wait_for_a_missing_rank(rank: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Join the process group of two ranks, of which the other one never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MUSTER_NCCL_TIMEOUT", raising=False)
    monkeypatch.setattr(process_group, "MARGIN_S", 0)
    with process_group.process_group(config):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_names_the_key_of_the_time_out(
    rank: int, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = [f"cluster.network.{name}_timeout_s=1" for name in ("nccl", "step", "save")]
    with pytest.raises(dist.DistError) as caught:
        wait_for_a_missing_rank(rank, compose("cluster.train.gpus_per_node=0", *network), monkeypatch)
    status, remedy = classify(caught.value)
    assert status == "nccl" and "raise cluster.network.nccl_timeout_s" in remedy, repr(caught.value)


def missing_module() -> None:
    import muster_has_no_such_module  # type: ignore[import-not-found]  # noqa: F401


def chained() -> None:
    try:
        full()
    except OSError as error:
        raise RuntimeError("could not save") from error


@pytest.mark.parametrize(
    ("work", "status", "remedy"),
    [
        (lambda: torch.empty(2**45), "out_of_memory", "memory_gib"),
        (lambda: bytearray(2**60), "out_of_memory", "memory_gib"),
        (full, "user_error", "free space"),
        (chained, "user_error", "free space"),
        (lambda: torch.load("/nowhere/weights.pt"), "user_error", "every node"),
        (lambda: AutoConfig.from_pretrained("/nowhere/model"), "user_error", "every node can read"),
        (lambda: hf_hub_download("a/b", "config.json", local_files_only=True), "user_error", "gated"),
        (missing_module, "user_error", "cluster.python"),
        (rendezvous, "nccl", "preflight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_errors_that_are_really_raised(work: Callable[[], object], status: str, remedy: str) -> None:
    with pytest.raises(Exception) as caught:
        work()
    actual_status, actual_remedy = classify(caught.value)
    assert actual_status == status, repr(caught.value)
    assert remedy in actual_remedy


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has ..."), "out_of_memory"),
        (ACCELERATOR("CUDA error: out of memory"), "out_of_memory"),
        (ACCELERATOR("CUDA error: uncorrectable ECC error encountered"), "bad_node"),
        (ACCELERATOR("CUDA error: unspecified launch failure"), "bad_node"),
        (ACCELERATOR("CUDA error: device-side assert triggered"), "failed"),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"), "nccl"),
        (dist.DistNetworkError("The client socket has failed to connect to (n1, 20077)."), "nccl"),
        (dist.DistStoreError("wait timeout after 1000ms, keys: /worker/1"), "nccl"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/work/run"), "user_error"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_that_need_a_gpu_or_a_quota(error: Exception, status: str) -> None:
    """Made here with torch's own types and the messages of the CUDA runtime and NCCL."""
    assert classify(error)[0] == status
