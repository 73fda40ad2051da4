"""Checkpoints written in the background: equal to those of a blocking save, published by all ranks or by none."""

import os
import resource
import signal
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conf.files import read_json
from conf.schema import Config
from jobs import backends, preprocess, train
from jobs.backends import host_staging
from jobs.checkpoint import checkpointing, paths
from jobs.checkpoint.async_save import Saver
from jobs.checkpoint.paths import checkpoints_folder
from jobs.distributed import host_memory
from jobs.distributed.process_group import process_group
from jobs.model import build
from jobs.monitoring.metrics import Metrics
from tests.jobs.checkpoint.test_reshard import WORDS, loss
from tests.jobs.curves import SMALL, losses, runs, train_each
from tests.jobs.ranks import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def update(backend, engine) -> None:
    backend.backward(engine, loss(engine), last=True)
    backend.step(engine, 1e-2)


def both(rank: int, configs: list[Config]) -> None:
    """Save the same state in both ways, with updates between the copy and the write; then fill the disk of one rank."""
    with process_group(configs[0]) as world:
        for config in configs:
            backend = backends.import_backend(config)
            engine = backend.wrap(build.build(config), config, world)
            saver = Saver(config, world, Metrics(config, world, last_step=9, first_step=0))
            update(backend, engine)
            saver.save(backend, engine, 1, checkpointing.layout(config, world), wait=True)
            saver.save(backend, engine, 2, checkpointing.layout(config, world), wait=False)
            for _ in range(2):
                update(backend, engine)
            saver.publish_pending()
            assert paths.published_checkpoints(config)[0].name == "step-00000002"
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            saver.save(backend, engine, 3, checkpointing.layout(config, world), wait=False)
            with pytest.raises(OSError, match="" if rank else "rank 1 on "):
                saver.publish_pending()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert [path.name for path in checkpoints_folder(config).glob("*-00000003*")] == []


def prepared(rank: int, config: Config) -> None:
    """A save allocates no more memory than `prepare` has allocated."""
    slabs: list[int] = []
    map_slab = host_staging.SlabAllocator._map_slab
    host_staging.SlabAllocator._map_slab = lambda self, size: slabs.append(size) or map_slab(self, size)
    with process_group(config) as world:
        backend = backends.import_backend(config)
        engine = backend.wrap(build.build(config), config, world)
        saver = Saver(config, world, Metrics(config, world, last_step=9, first_step=0))
        update(backend, engine)
        saver.prepare(backend, engine)
        saver._stager.wait_prepared()
        taken = len(slabs)
        assert taken > 0
        for step in (1, 2):
            saver.save(backend, engine, step, checkpointing.layout(config, world), wait=False)
            saver.publish_pending()
        assert len(slabs) == taken


@pytest.mark.parametrize("words", ["fsdp", "fsdp adapter=lora", "zero2", "zero3", "zero3 adapter=lora"])
def test_host_memory_is_taken_before_the_first_save(words, compose, tmp_path) -> None:
    spawn(prepared, 2, compose(f"run_dir={tmp_path}", *WORDS, *f"parallel={words}".split()))


def shards(config: Config, step: int) -> dict[str, object]:
    files = read_json(checkpointing.step_folder(config, step) / "manifest.json")["files"]
    return {name: entry for name, entry in files.items() if name != ".metadata"}  # each has an ID of its own


def check(compose, folder: Path, layouts: tuple[str, ...], *words: str) -> None:
    configs = [compose(f"run_dir={folder}/{name}", f"parallel={name}", *WORDS, *words) for name in layouts]
    for config in configs:
        Path(config.run_dir).mkdir()
    spawn(both, 2, configs)
    for config in configs:
        assert len(shards(config, 1)) >= 2
        assert shards(config, 2) == shards(config, 1), config.parallel.name


def test_both_ways_write_the_same_and_a_full_disk_is_met_in_both(compose, tmp_path) -> None:
    check(compose, tmp_path, ("fsdp", "zero3"))


@pytest.mark.proof
@pytest.mark.parametrize("words", [[], ["adapter=lora"], ["train.precision=bf16"]], ids=["full", "lora", "bf16"])
def test_both_ways_write_the_same_in_every_layout(words, compose, tmp_path) -> None:
    check(compose, tmp_path, ("fsdp", "ddp", "zero1", "zero2", "zero3", "zero3_offload"), *words)


def killed(rank: int, config: Config) -> None:
    """Train until step 4 is written in the background; then rank 1 is killed by SIGKILL."""
    real = checkpointing.manifest.flush_and_describe

    def flush_and_describe(hidden, number):
        if rank == 1 and "step-00000004" in hidden.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(hidden, number)

    checkpointing.manifest.flush_and_describe = flush_and_describe
    train.run(config)


@pytest.mark.proof
@pytest.mark.parametrize("layout", ["fsdp", "zero2"])
def test_killed_while_it_writes_in_the_background_it_goes_on_from_the_one_before(layout, compose, tmp_path) -> None:
    words = [*SMALL, "cluster.train.ranks_per_node=2", "train.save_every=2", f"parallel={layout}"]
    config = compose(f"run_dir={tmp_path}/data", *words)
    preprocess.run(config)
    whole, broken = runs(config, tmp_path / "data/data", tmp_path, {"whole": {}, "broken": {}})
    with pytest.raises(Exception, match="SIGKILL|terminated|process"):
        spawn(killed, 2, broken)
    assert checkpointing.select_for_consolidation(broken)[1]["step"] == 2
    assert [losses(lines) for lines in train_each([broken], 2)] == [losses(lines) for lines in train_each([whole], 2)]
    assert checkpointing.select_for_consolidation(broken)[1]["step"] == 6


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {
            name.partition("/")[2]: archive.read(name) for name in archive.namelist() if "serialization" not in name
        }


def test_a_copy_keeps_what_shares_storage_together(tmp_path) -> None:
    base = torch.arange(12.0)
    state = {
        "whole": base,
        "views": [base[2:4], base[4:].view(2, 4)],
        "again": base,
        "step": torch.tensor(3),
        "text": (1, "a"),
    }
    state["module"] = torch.nn.Linear(2, 2).state_dict()
    state["module"]._metadata["seen"] = base
    copy = host_staging.Stager(torch.device("cpu")).copy_object(state)
    torch.save(state, tmp_path / "one")
    torch.save(copy, tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    base.zero_()
    assert torch.equal(copy["views"][1], torch.arange(4.0, 12.0).view(2, 4))
    assert copy["again"] is copy["whole"]


def test_memory_of_copies_is_used_again() -> None:
    """Memory is used again for the same tensor, or, if that is gone, for another one of its size; never for two at once."""
    stager = host_staging.Stager(torch.device("cpu"))
    sizes = [1, 1000, 2**20, 2**22, 3 * 2**20, 0]
    state = {str(size): torch.randn(size) for size in sizes}
    first = stager.copy_state_dict(state)
    assert all(torch.equal(first[name], value) for name, value in state.items())
    spans = sorted((item.data_ptr(), item.data_ptr() + item.nbytes) for item in first.values() if item.numel())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for value in state.values():
        value.add_(1)
    places = {name: item.data_ptr() for name, item in first.items()}
    second = stager.copy_state_dict(state)
    assert {name: item.data_ptr() for name, item in second.items()} == places
    assert all(torch.equal(second[name], value) for name, value in state.items())
    del state["1000"]
    state["new"] = torch.randn(1000)
    third = stager.copy_state_dict(state)
    assert third["new"].data_ptr() == places["1000"]
    assert torch.equal(third["new"], state["new"])
    assert torch.equal(third["1"], state["1"])


def test_free_memory_is_that_of_the_tightest_group(tmp_path, monkeypatch) -> None:
    assert host_memory.free_bytes() > 0
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    before = host_memory.free_bytes()
    for name, text in {"max": "3000\n", "current": "2500\n", "stat": "anon 1\ninactive_file 100\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_memory.free_bytes() == 600 < before
