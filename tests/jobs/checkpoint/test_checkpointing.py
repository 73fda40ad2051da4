"""Checkpoints with a manifest: damaged files are named, the checkpoint before is used, a full disk leaves no half checkpoint."""

import errno
import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conf.errors import RunError
from conf.files import read_json, write_json
from conf.schema import Config
from jobs import backends, consolidate
from jobs.checkpoint import checkpointing, manifest, paths, retention
from jobs.checkpoint.paths import checkpoints_folder
from jobs.distributed.process_group import World, process_group
from jobs.model import build
from tests.jobs import checkpoints
from tests.jobs.ranks import spawn

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
INFO = {"layout": "fsdp", "backend": "fsdp", "config": "digest"}
SIZE = 300_000


def save(config, step, world=ALONE, bytes_=SIZE, **more):
    """Save a checkpoint with one file for each rank, filled with the numbers of step and rank."""

    def write(folder):
        (folder / "inner").mkdir(exist_ok=True)
        (folder / f"inner/__{world.rank}_0.distcp").write_bytes(bytes([step, world.rank]) * (bytes_ // 2))
        if world.is_main:
            (folder / ".metadata").write_bytes(b"what lies where")

    return checkpoints.save(config, step, world, write, INFO, **more)


@pytest.fixture
def config(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PIECE", 100_000)
    return compose(f"run_dir={tmp_path}/run", "train.keep_checkpoints=3", "parallel=fsdp")


@pytest.fixture
def saved(config):
    for step in (2, 4, 6):
        save(config, step)
    return checkpoints_folder(config)


def resumed(config):
    read = []
    step = checkpointing.resume(config, ALONE, read.append)
    assert [path.name for path in read] == ([f"step-{step:08d}"] if step else [])
    return step


def steps(config):
    return [paths.step_of(path) for path in paths.published_checkpoints(config)]


def hidden(config):
    return sorted(path.name for path in checkpoints_folder(config).glob(".*"))


def test_the_manifest_names_every_file(config, saved) -> None:
    found = read_json(saved / "step-00000006" / manifest.NAME)
    assert found["files"].keys() == {".metadata", "inner/__0_0.distcp"}
    assert found["files"]["inner/__0_0.distcp"]["bytes"] == SIZE
    assert len(found["files"]["inner/__0_0.distcp"]["xxh3"]) == 3
    assert manifest.size(saved / "step-00000006") == SIZE + 15
    manifest.check(saved / "step-00000006")
    assert (saved / "latest").read_text() == "step-00000006\n" and hidden(config) == []


def cut(file):
    os.truncate(file, SIZE - 1)


def flip(file):
    with file.open("r+b") as opened:
        opened.seek(150_000)
        opened.write(b"\xff")


def lose(file):
    file.unlink()


def garble(name):
    return lambda file: (file.parent.parent / name).write_text('{"step": 6')


DAMAGE = {
    "cut short": (cut, "inner/__0_0.distcp has 299999 bytes, 300000 were written"),
    "a flipped byte": (flip, r"inner/__0_0.distcp has a wrong checksum in bytes 100000 to 200000"),
    "a missing file": (lose, "inner/__0_0.distcp is missing"),
    "a garbled manifest": (garble("manifest.json"), "step-00000006: checkpoint.json or manifest.json is damaged"),
    "a garbled checkpoint.json": (garble("checkpoint.json"), "checkpoint.json or manifest.json is damaged"),
    "no checkpoint.json": (
        lambda file: (file.parent.parent / "checkpoint.json").unlink(),
        "checkpoint.json is missing",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(damage, said, config, saved, capsys) -> None:
    damage(saved / "step-00000006/inner/__0_0.distcp")
    with pytest.raises(RunError, match=said):
        manifest.check(saved / "step-00000006")
    if (
        damage is not flip
    ):  # consolidation sees it as it reads (tests/jobs/consolidation/test_run.py: test_only_what_is_read_is_checked)
        with pytest.raises(RunError, match=said):  # it must not silently take an older one
            consolidate.run(config)
    capsys.readouterr()
    assert resumed(config) == 4
    out = capsys.readouterr().out
    assert out.count("is damaged and skipped") == 1 and out.startswith(
        "warning   checkpoint step-00000006 is damaged and skipped: "
    )
    assert (saved / "latest").read_text() == "step-00000004\n"
    assert steps(config) == [4, 2] and hidden(config) == [".step-00000006.damaged"]
    save(config, 5)
    assert hidden(config) == [".step-00000006.damaged"]
    save(config, 6)
    manifest.check(saved / "step-00000006")
    assert steps(config) == [6, 5, 4] and hidden(config) == []


def test_if_all_are_damaged_nothing_is_resumed_or_renamed(config, saved) -> None:
    for path in saved.glob("step-*"):
        lose(path / "inner/__0_0.distcp")
    with pytest.raises(RunError, match="all 3 checkpoints are damaged: restore their files"):
        resumed(config)
    assert steps(config) == [6, 4, 2]


def test_no_checkpoint_yet(config) -> None:
    assert checkpointing.select_for_consolidation(config) is None and resumed(config) == 0


def test_resume_ignores_latest_and_half_written_checkpoints(config, saved) -> None:
    (saved / "latest").unlink()
    for name in (".step-00000008.partial", ".step-00000001.old"):
        (saved / name).mkdir()
        (saved / name / "__0_0.distcp").write_bytes(b"half")
    assert resumed(config) == 6
    assert hidden(config) == []


def test_a_checkpoint_from_before_manifests(config, saved) -> None:
    (saved / "step-00000006" / manifest.NAME).unlink()
    assert resumed(config) == 6
    manifest.check(saved / "step-00000006")
    save(config, 8)
    assert steps(config) == [8, 6, 4]


def test_only_a_damaged_checkpoint_is_written_again(config, saved) -> None:
    path = saved / "step-00000006"
    before = path.stat().st_ino
    assert save(config, 6) == path and path.stat().st_ino == before
    cut(path / "inner/__0_0.distcp")
    assert save(config, 6) == path
    manifest.check(path)
    assert hidden(config) == []


def test_the_newest_and_the_milestones_stay(config) -> None:
    config.train.keep_checkpoints, config.train.keep_every = 2, 4
    for step in range(1, 12):
        save(config, step)
    assert steps(config) == [11, 10, 8, 4]


def test_the_only_good_one_stays(config, saved) -> None:
    for step in (4, 6):
        cut(saved / f"step-{step:08d}/inner/__0_0.distcp")
    retention.prune(config, 1)
    assert 2 in steps(config)
    save(config, 8)
    config.train.keep_checkpoints = 1
    save(config, 9)
    assert steps(config) == [9]


Usage = namedtuple("Usage", "free")


def test_too_little_disk_space_is_an_error_before_anything_is_written(config, saved, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(SIZE))
    with pytest.raises(
        RunError,
        match=r"checkpoints=.*/run/checkpoints: the next checkpoint needs 0.000279 GiB, only .* are free: free space",
    ):
        save(config, 8)
    assert (
        steps(config) == [6, 4] and hidden(config) == []
    )  # only the one that a new checkpoint would have replaced is deleted
    config.train.keep_checkpoints = 1
    with pytest.raises(RunError):
        save(config, 8)
    assert steps(config) == [6]


def test_pruning_makes_room(config, saved, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2 * SIZE if len(steps(config)) < 3 else 0))
    save(config, 8)
    assert steps(config) == [8, 6, 4]


def test_the_first_checkpoint_needs_space_for_all_parameters(config, monkeypatch) -> None:
    network = torch.nn.Linear(10, 10)
    network.bias.requires_grad_(False)
    assert checkpointing.expected_bytes(network, config) == 1200
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1199))
    with pytest.raises(RunError, match="needs 1.12e-06 GiB"):
        save(config, 2, expected_bytes=checkpointing.expected_bytes(network, config))
    save(config, 2, expected_bytes=1199)


def two_ranks(rank: int, config: Config) -> None:
    with process_group(config) as world:
        path = save(config, 2, world)
        listed = read_json(path / manifest.NAME)["files"]
        assert listed.keys() == {".metadata", "inner/__0_0.distcp", "inner/__1_0.distcp"}
        save(config, 4, world)
        if rank == 1:
            flip(checkpoints_folder(config) / "step-00000004/inner/__1_0.distcp")
        assert bool(manifest.checksum_problems(checkpoints_folder(config) / "step-00000004", rank, 2)) == (rank == 1)
        found = checkpointing.find_newest(config, world)  # only rank 1 has read the damaged file
        assert checkpointing.resume(config, world, lambda _: None, found) == 2


def full_disk(rank: int, config: Config, limit: int) -> None:
    """Rank 1 cannot write files of more than `limit` bytes."""
    with process_group(config) as world:
        save(config, 2, world, bytes_=1000)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        state = {str(rank): torch.randn(SIZE // 4)}
        writes = [
            lambda folder: (folder / f"__{rank}_0.distcp").write_bytes(bytes(SIZE)),
            lambda folder: dcp.save(state, checkpoint_id=folder),
        ]
        for write in writes:
            with pytest.raises(OSError, match="" if rank else "rank 1 on .*" + os.strerror(errno.EFBIG)) as caught:
                checkpoints.save(config, 4, world, write, INFO)
            assert caught.value.errno == errno.EFBIG
            torch.distributed.barrier()
            assert steps(config) == [2] and hidden(config) == []
            torch.distributed.barrier()  # the next save makes a hidden folder
        assert checkpointing.resume(config, world, lambda _: None) == 2


@pytest.mark.slow
def test_ranks_share_the_checksums_and_agree(compose, tmp_path, capfd) -> None:
    spawn(two_ranks, 2, compose(f"run_dir={tmp_path}/run"))
    said = capfd.readouterr().err  # ranks of tests set up no logging, so Python writes warnings to stderr
    assert said.count("step-00000004 is damaged and skipped") == 1 and "__1_0.distcp has a wrong checksum" in said


@pytest.mark.slow
def test_a_rank_whose_disk_is_full_fails_on_all(compose, tmp_path) -> None:
    spawn(full_disk, 2, compose(f"run_dir={tmp_path}/run"), 100_000)


def zero(rank: int, config: Config) -> None:
    with process_group(config) as world:
        backend = backends.import_backend(config)
        network = build.build(config)
        expected = checkpointing.expected_bytes(network, config)
        engine = backend.wrap(network, config, world)

        def write(folder):
            backend.save(engine, folder)

        info = INFO | {"layout": config.parallel.name, "backend": "zero"}
        path = checkpoints.save(config, 1, world, write, info)
        assert checkpointing.resume(config, world, lambda folder: backend.load(engine, folder)) == 1
        assert not manifest.checksum_problems(path)
        assert (
            expected == checkpointing.expected_bytes(engine.module, config) > 0
        )  # of whole parameters, though they are sharded now
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="" if rank else "rank 1 on "):
            checkpoints.save(config, 2, world, write, INFO)
        torch.distributed.barrier()
        assert steps(config) == [1] and hidden(config) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_deepspeed_on_a_full_disk(layout, compose, tmp_path) -> None:
    words = ["cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0", "train.global_batch=4"]
    spawn(zero, 2, compose(f"run_dir={tmp_path}/run", f"parallel={layout}", "train.precision=fp32", *words))


def test_consolidation_sums_only_where_no_weight_was_recorded(config, saved, monkeypatch) -> None:
    flip(saved / "step-00000006/inner/__0_0.distcp")
    write_json(saved / "step-00000006/fingerprint.json", {"weight": "0" * 64})
    with pytest.raises(Exception) as caught:
        consolidate.run(config)
    assert "wrong checksum" not in str(caught.value)  # it went on to files that this checkpoint does not have
