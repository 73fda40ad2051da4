"""Checkpoints with a manifest: damage is found by file, the one before is taken, a full disk leaves nothing half."""

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
from jobs.distributed.process_group import World, process_group
from jobs.model import build
from tests.jobs.ranks import spawn

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ABOUT = {"layout": "fsdp", "backend": "fsdp", "config": "digest"}
SIZE = 300_000


def save(config, step, world=ALONE, bytes_=SIZE, **more):
    """A checkpoint of one file a rank, of this step and rank all over."""

    def write(folder):
        (folder / "inner").mkdir(exist_ok=True)
        (folder / f"inner/__{world.rank}_0.distcp").write_bytes(bytes([step, world.rank]) * (bytes_ // 2))
        if world.is_main:
            (folder / ".metadata").write_bytes(b"what lies where")

    return checkpointing.save(config, step, world, write, ABOUT, **more)


@pytest.fixture
def config(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PIECE", 100_000)
    return compose(f"run_dir={tmp_path}/run", "train.keep_checkpoints=3", "parallel=fsdp")


@pytest.fixture
def saved(config):
    for step in (2, 4, 6):
        save(config, step)
    return checkpointing.folder(config)


def resumed(config):
    read = []
    step = checkpointing.resume(config, ALONE, read.append)
    assert [path.name for path in read] == ([f"step-{step:08d}"] if step else [])
    return step


def steps(config):
    return [paths.step_of(path) for path in paths.published(config)]


def hidden(config):
    return sorted(path.name for path in checkpointing.folder(config).glob(".*"))


def test_the_manifest_names_every_file(config, saved):
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
    "a flipped byte": (flip, r"inner/__0_0.distcp is not what was written \(bytes 100000 to 200000\)"),
    "a missing file": (lose, "inner/__0_0.distcp is missing"),
    "a garbled manifest": (garble("manifest.json"), "step-00000006: checkpoint.json or manifest.json is no longer"),
    "a garbled checkpoint.json": (garble("checkpoint.json"), "checkpoint.json or manifest.json is no longer"),
    "no checkpoint.json": (
        lambda file: (file.parent.parent / "checkpoint.json").unlink(),
        "checkpoint.json is missing",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(damage, said, config, saved, capsys):
    damage(saved / "step-00000006/inner/__0_0.distcp")
    with pytest.raises(RunError, match=said):
        manifest.check(saved / "step-00000006")
    if damage is not flip:  # which a merge sees as it reads (test_what_is_read_is_checked_and_nothing_else)
        with pytest.raises(RunError, match=said):  # it must not take an older one without a word
            consolidate.run(config)
    capsys.readouterr()
    assert resumed(config) == 4
    out = capsys.readouterr().out
    assert out.count("is damaged and skipped") == 1 and out.startswith(
        "checkpoint step-00000006 is damaged and skipped: "
    )
    assert (saved / "latest").read_text() == "step-00000004\n"
    assert steps(config) == [4, 2] and hidden(config) == [".step-00000006.damaged"]
    save(config, 5)
    assert hidden(config) == [".step-00000006.damaged"]
    save(config, 6)
    manifest.check(saved / "step-00000006")
    assert steps(config) == [6, 5, 4] and hidden(config) == []


def test_latest_looks_at_sizes_alone(config, saved, capsys):
    flip(saved / "step-00000006/inner/__0_0.distcp")
    assert checkpointing.latest(config)[1]["step"] == 6
    cut(saved / "step-00000006/inner/__0_0.distcp")
    lose(saved / "step-00000004/inner/__0_0.distcp")
    assert checkpointing.latest(config)[0].name == "step-00000002"
    assert capsys.readouterr().out.count("is damaged and skipped: ") == 2


def test_where_all_are_damaged_it_stops_and_leaves_them(config, saved):
    for path in saved.glob("step-*"):
        lose(path / "inner/__0_0.distcp")
    with pytest.raises(RunError, match="none of 3 checkpoints is whole"):
        resumed(config)
    assert steps(config) == [6, 4, 2]


def test_no_checkpoint_yet(config):
    assert checkpointing.latest(config) is None and resumed(config) == 0


def test_without_latest_and_beside_half_written_ones(config, saved):
    (saved / "latest").unlink()
    for name in (".step-00000008.partial", ".step-00000001.old"):
        (saved / name).mkdir()
        (saved / name / "__0_0.distcp").write_bytes(b"half")
    assert resumed(config) == 6
    assert hidden(config) == []


def test_a_checkpoint_from_before_manifests(config, saved):
    (saved / "step-00000006" / manifest.NAME).unlink()
    assert resumed(config) == 6
    manifest.check(saved / "step-00000006")
    save(config, 8)
    assert steps(config) == [8, 6, 4]


def test_a_damaged_one_is_written_anew_a_whole_one_is_not(config, saved):
    path = saved / "step-00000006"
    before = path.stat().st_ino
    assert save(config, 6) == path and path.stat().st_ino == before
    cut(path / "inner/__0_0.distcp")
    assert save(config, 6) == path
    manifest.check(path)
    assert hidden(config) == []


def test_the_newest_and_the_milestones_stay(config):
    config.train.keep_checkpoints, config.train.keep_every = 2, 4
    for step in range(1, 12):
        save(config, step)
    assert steps(config) == [11, 10, 8, 4]


def test_the_only_good_one_stays(config, saved):
    for step in (4, 6):
        cut(saved / f"step-{step:08d}/inner/__0_0.distcp")
    retention.prune(config, 1)
    assert 2 in steps(config)
    save(config, 8)
    config.train.keep_checkpoints = 1
    save(config, 9)
    assert steps(config) == [9]


Usage = namedtuple("Usage", "free")


def test_too_little_room_is_said_before_anything_is_written(config, saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(SIZE))
    with pytest.raises(
        RunError, match=r"checkpoints=.*/run/checkpoints: the next one needs 0.000279 GiB, .* are free: free space"
    ):
        save(config, 8)
    assert steps(config) == [6, 4] and hidden(config) == []  # what the new one would have pushed out is gone, no more
    config.train.keep_checkpoints = 1
    with pytest.raises(RunError):
        save(config, 8)
    assert steps(config) == [6]


def test_pruning_makes_room(config, saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2 * SIZE if len(steps(config)) < 3 else 0))
    save(config, 8)
    assert steps(config) == [8, 6, 4]


def test_the_first_one_goes_by_the_parameters(config, monkeypatch):
    network = torch.nn.Linear(10, 10)
    network.bias.requires_grad_(False)
    assert checkpointing.expected_bytes(network) == 1200
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1199))
    with pytest.raises(RunError, match="needs 1.12e-06 GiB"):
        save(config, 2, expected_bytes=checkpointing.expected_bytes(network))
    save(config, 2, expected_bytes=1199)


def two_ranks(rank: int, config: Config) -> None:
    with process_group(config) as world:
        path = save(config, 2, world)
        listed = read_json(path / manifest.NAME)["files"]
        assert listed.keys() == {".metadata", "inner/__0_0.distcp", "inner/__1_0.distcp"}
        save(config, 4, world)
        if rank == 1:
            flip(checkpointing.folder(config) / "step-00000004/inner/__1_0.distcp")
        assert bool(manifest.differing(checkpointing.folder(config) / "step-00000004", rank, 2)) == (rank == 1)
        found = checkpointing.find(config, world)  # only rank 1 has read what is damaged
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
                checkpointing.save(config, 4, world, write, ABOUT)
            assert caught.value.errno == errno.EFBIG
            torch.distributed.barrier()
            assert steps(config) == [2] and hidden(config) == []
            torch.distributed.barrier()  # the next save makes a hidden folder
        assert checkpointing.resume(config, world, lambda _: None) == 2


@pytest.mark.slow
def test_ranks_share_the_sums_and_agree(compose, tmp_path, capfd):
    spawn(two_ranks, 2, compose(f"run_dir={tmp_path}/run"))
    said = capfd.readouterr().out
    assert said.count("step-00000004 is damaged and skipped") == 1 and "__1_0.distcp is not what was written" in said


@pytest.mark.slow
def test_a_rank_whose_disk_is_full_fails_on_all(compose, tmp_path):
    spawn(full_disk, 2, compose(f"run_dir={tmp_path}/run"), 100_000)


def zero(rank: int, config: Config) -> None:
    with process_group(config) as world:
        backend = backends.chosen(config)
        network = build.build(config)
        expected = checkpointing.expected_bytes(network)
        engine = backend.wrap(network, config, world)

        def write(folder):
            backend.save(engine, folder)

        about = ABOUT | {"layout": config.parallel.name, "backend": "zero"}
        path = checkpointing.save(config, 1, world, write, about)
        assert checkpointing.resume(config, world, lambda folder: backend.load(engine, folder)) == 1
        assert not manifest.differing(path)
        assert (
            expected == checkpointing.expected_bytes(engine.module) > 0
        )  # of whole parameters, though they are sharded now
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="" if rank else "rank 1 on "):
            checkpointing.save(config, 2, world, write, ABOUT)
        torch.distributed.barrier()
        assert steps(config) == [1] and hidden(config) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_deepspeed_on_a_full_disk(layout, compose, tmp_path):
    words = ["cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0", "train.global_batch=4"]
    spawn(zero, 2, compose(f"run_dir={tmp_path}/run", f"parallel={layout}", "train.precision=fp32", *words))


def test_consolidation_sums_only_where_no_weight_was_recorded(config, saved, monkeypatch):
    flip(saved / "step-00000006/inner/__0_0.distcp")
    write_json(saved / "step-00000006/fingerprint.json", {"weight": "0" * 64})
    with pytest.raises(Exception) as caught:
        consolidate.run(config)
    assert "is not what was written" not in str(caught.value)  # it went on, to files that are none here
