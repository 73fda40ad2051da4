"""jobs/checkpoint/disk_space.py: a disk that cannot hold the checkpoints to come is found before the first step.

The disks are real: a tmpfs of a few MiB, which only root can mount.
"""

import errno
import logging
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import RunError
from conf.schema import Config
from jobs.checkpoint import checkpointing, disk_space
from jobs.checkpoint.paths import checkpoints_folder
from jobs.distributed.process_group import World
from jobs.model import build
from tests.conftest import Compose
from tests.jobs.ranks import run

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
STEPS = ("train.steps=100", "train.warmup_steps=0", "train.save_every=10")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def resize(disk: Path, size: float) -> None:
    subprocess.run(["mount", "-o", f"remount,size={int(size) // 4096 * 4096 + 8 * 4096}", disk], check=True)


@pytest.fixture(scope="module")
def model(compose: Compose) -> Any:
    return build.build_on_meta(compose())


def check(model: Any, config: Config) -> None:
    disk_space.check(config, lambda: model, ALONE, config.train.steps)


def refusal(model: Any, config: Config) -> str:
    with pytest.raises(RunError) as caught:
        check(model, config)
    (problem,) = caught.value.problems
    assert problem.key == "run_dir"
    return problem.message


def test_a_disk_is_refused_if_the_last_save_cannot_fit(model, disk: Path, compose: Compose) -> None:
    config = compose(f"run_dir={disk}/run", *STEPS, "train.keep_checkpoints=1", "jobs=[train]")
    one = checkpointing.expected_bytes(model, config)
    assert one == 12 * sum(weight.numel() for weight in model.parameters())
    resize(disk, 1.9 * one)
    assert (
        "needs at least 0.0194 GiB: 2 checkpoints of 0.00972 GiB at the same time. Set train.save_every=0 "
        in refusal(model, config)
    )
    check(model, compose(f"run_dir={disk}/run", *STEPS, "train.save_every=0", "train.keep_every=0", "jobs=[train]"))
    resize(disk, 2 * one)
    check(model, config)
    assert list(checkpoints_folder(config).iterdir()) == []
    assert os.statvfs(disk).f_blocks - os.statvfs(disk).f_bfree <= 2


def test_milestones_are_counted(model, disk: Path, compose: Compose) -> None:
    config = compose(f"run_dir={disk}/run", *STEPS, "train.keep_every=30", "jobs=[train]")
    resize(disk, 3.5 * checkpointing.expected_bytes(model, config))
    assert "4 checkpoints of 0.00972 GiB at the same time. Set train.keep_every=0, or " in refusal(model, config)
    config.train.keep_every = 0
    check(model, config)


def test_the_merged_model_is_counted(model, disk: Path, compose: Compose) -> None:
    words = (f"run_dir={disk}/run", *STEPS, "train.save_every=0", "train.precision=fp32")
    config = compose(*words)
    one = checkpointing.expected_bytes(model, config)
    resize(disk, 1.2 * one)
    assert "then 1 beside the merged model of 0.00324 GiB. Set pipeline=train. " in refusal(model, config)
    check(model, compose(*words, "pipeline=train"))
    check(model, compose(*words, "consolidate.dtype=bf16"))
    resize(disk, 1.34 * one)
    check(model, config)


def test_the_towers_of_a_multimodal_model_are_counted(model, disk: Path, compose: Compose) -> None:
    words = (f"run_dir={disk}/run", *STEPS, "train.save_every=0", "train.precision=fp32")
    config = compose(*words, "model.architecture.tower_gib=0.002")
    resize(disk, 1.34 * checkpointing.expected_bytes(model, config))
    assert "then 1 beside the merged model of 0.00524 GiB. Set pipeline=train. " in refusal(model, config)
    check(model, compose(*words, "model.architecture.tower_gib=0.002", "pipeline=train"))


def test_a_disk_for_fewer_checkpoints_is_only_said(model, disk: Path, compose: Compose, caplog) -> None:
    words = (f"run_dir={disk}/run", *STEPS, "jobs=[train]")
    config = compose(*words, "train.keep_checkpoints=5")
    resize(disk, 4.2 * checkpointing.expected_bytes(model, config))
    with caplog.at_level(logging.WARNING):
        check(model, config)
    assert "train.keep_checkpoints=5 needs 0.0583 GiB in the run folder" in caplog.text
    remedy = re.search(r"train\.keep_checkpoints=\d+(?= fits)", caplog.text)
    assert remedy
    caplog.clear()
    check(model, compose(*words, remedy[0]))
    assert caplog.text == ""
    assert remedy[0] == "train.keep_checkpoints=3"


def test_a_resumed_run_needs_less(model, disk: Path, compose: Compose) -> None:
    config = compose(f"run_dir={disk}/run", *STEPS, "jobs=[train]", "train.keep_checkpoints=1")
    one = checkpointing.expected_bytes(model, config)
    resize(disk, 2.1 * one)
    saved = checkpoints_folder(config) / "step-00000090"
    saved.mkdir(parents=True)
    (saved / "shard").write_bytes(bytes(one))
    check(model, config)
    (disk / "other").write_bytes(bytes(one // 4))
    assert "which needs at least 0.0194 GiB: 2 checkpoints" in refusal(model, config)
    saved.rename(saved.with_name("step-00000100"))  # nothing is left to save
    check(model, config)


def test_preflight_checks_one_save_where_the_steps_are_not_known(model, disk: Path, compose: Compose) -> None:
    config = compose(f"run_dir={disk}/run", "train.steps=null", "train.epochs=3", "train.save_every=10", "jobs=[train]")
    one = checkpointing.expected_bytes(model, config)
    resize(disk, 0.9 * one)
    assert "which needs at least 0.00972 GiB: a checkpoint of 0.00972 GiB. " in refusal(model, config)
    resize(disk, one)
    check(model, config)


def test_space_that_the_user_may_not_use_is_found(model, tmp_path: Path, compose: Compose) -> None:
    """A limit of file sizes stands for a quota: neither can be seen in the free space."""
    config = compose(f"run_dir={tmp_path}/run", "jobs=[train]")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        said = refusal(model, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot be written there ({os.strerror(errno.EFBIG)}), although the disk has more free. Raise your " in said
    check(model, config)


@pytest.mark.slow
def test_a_run_on_a_small_disk_ends_before_the_first_step(disk: Path) -> None:
    resize(disk, 8e6)
    words = ["data.max_rows=80", "train.steps=4", "train.warmup_steps=0", "cluster.train.ranks_per_node=1"]
    said = run(f"run_dir={disk}/run", "pipeline=train", *words, code=2)
    assert "train user_error" in said
    assert "run_dir=" in said
    assert "its disk has" in said
    assert not (disk / "run/metrics.jsonl").exists()
    assert "Traceback" not in said
