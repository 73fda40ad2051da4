"""launcher/estimate/suggest.py: its suggestion fits, and nothing cheaper does."""

import pytest

from launcher.estimate import suggest
from launcher.estimate.memory import estimate
from launcher.estimate.table import GIB
from tests.conftest import Compose

SUGGESTIONS = [
    ("parallel=ddp", 79, "parallel=fsdp"),
    ("parallel=zero1 cluster.train.nodes=1", 45, "parallel=zero2"),
    ("parallel=zero1 cluster.train.nodes=1", 31.5, "parallel=zero3 train.activation_checkpointing=full"),
    ("parallel=fsdp cluster.train.nodes=1", 25, "cluster.train.nodes=2"),
    ("parallel=fsdp cluster.train.nodes=8 data.max_length=8192", 50, "train.activation_checkpointing=selective"),
    ("parallel=fsdp cluster.train.nodes=8 data.max_length=8192", 25, "train.activation_checkpointing=full"),
    ("parallel=fsdp cluster.train.nodes=1 data.max_length=8192 train.micro_batch=3 train.activation_checkpointing=full"
     " train.global_batch=24", 40, "train.micro_batch=1"),
    ("parallel=ddp cluster.train.nodes=8 data.max_length=32768 train.micro_batch=2 train.global_batch=128", 40,
     "parallel=fsdp train.activation_checkpointing=full train.micro_batch=1"),
    ("parallel=fsdp cluster.train.nodes=8 data.max_length=32768 train.activation_checkpointing=full", 45,
     "data.max_length=16384"),
    ("parallel=zero3 cluster.train.nodes=1 train.global_batch=8", 20, "parallel=zero3_offload"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "capacity", "change"), SUGGESTIONS, ids=[item[2] for item in SUGGESTIONS])
def test_the_first_change_that_fits_is_suggested(compose: Compose, words: str, capacity: float, change: str) -> None:
    command = ["cluster=slurm", "model=llama8b", "train.activation_checkpointing=none", *words.split()]
    suggestion = suggest.first_that_fits(compose(*command), capacity)
    assert suggestion
    assert suggestion.overrides.endswith(change)
    overrides = suggestion.overrides.split()
    overridden = {override.partition("=")[0] for override in overrides}
    kept = [word for word in command if word.partition("=")[0] not in overridden]
    size = estimate(compose(*kept, *overrides))
    assert size
    assert size.device.total <= capacity * GIB
    assert suggestion.device_bytes == size.device.total


def test_nothing_is_suggested_if_nothing_fits(compose: Compose) -> None:
    assert suggest.first_that_fits(compose("cluster=slurm", "model=llama405b"), 5) is None
