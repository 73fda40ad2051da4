"""A node reads into its page cache exactly the bytes that its ranks will need."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from jobs.tensor_io import prefetch
from tests.conftest import put

SHAPES = {"a": (8, 64), "b": (16, 3), "c": (8,)}


@pytest.fixture
def folder(tmp_path):
    save_file({name: torch.randn(shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors")
    return tmp_path


def config_of(compose, folder, *words, nodes=1, ranks=2):
    config = compose(*words)
    values = {"model.source": str(folder), "run_dir": str(folder / "run")}
    return put(config, values | {"cluster.train.nodes": nodes, "cluster.train.ranks_per_node": ranks})


def bytes_read(monkeypatch, config, node=0, local_rank=0):
    """Byte ranges (first, last + 1) that the threads have read, sorted."""
    runs, preadv = [], os.preadv

    def seen(file, buffers, offset):
        runs.append((offset, offset + preadv(file, buffers, offset)))

    with monkeypatch.context() as patch:
        ranks = config.cluster.train.ranks_per_node
        patch.setenv("LOCAL_RANK", str(local_rank))
        patch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        patch.setenv("RANK", str(node * ranks + local_rank))
        patch.setattr(prefetch.os, "preadv", seen)
        for thread in prefetch.begin(config):
            thread.join()
    return sorted(runs)


def total(runs):
    return sum(last - first for first, last in runs)


WHOLE = 4 * (8 * 64 + 16 * 3 + 8)
PRETRAINED = ["model=hub", "model.source=/base"]


@pytest.mark.parametrize(
    "words", [["parallel=fsdp"], ["parallel=zero3"], ["parallel=zero1"], ["parallel=ddp"]], ids=" ".join
)
def test_a_single_node_reads_all_of_it_once(compose, folder, monkeypatch, words) -> None:
    config = config_of(compose, folder, *PRETRAINED, *words)
    assert total(bytes_read(monkeypatch, config)) == WHOLE
    assert bytes_read(monkeypatch, config, local_rank=1) == []


@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_nodes_read_what_their_ranks_hold(compose, folder, monkeypatch, layout) -> None:
    config = config_of(compose, folder, *PRETRAINED, f"parallel={layout}", nodes=4)
    found = [bytes_read(monkeypatch, config, node) for node in range(4)]
    assert [total(runs) for runs in found] == [WHOLE // 4] * 4
    assert len({run for runs in found for run in runs}) == 4 * len(SHAPES)


@pytest.mark.parametrize(
    ("words", "nodes", "expected"),
    [
        (["parallel=zero2"], 4, [(0.0, 1.0)] * 4),
        (["parallel=hsdp", "parallel.shard_ranks=2"], 4, [(0.0, 1.0)] * 4),
        (["parallel=hsdp", "parallel.shard_ranks=4"], 4, [(0.0, 0.5), (0.5, 1.0)] * 2),
        (["parallel=hsdp", "parallel.shard_ranks=3"], 3, [(0.0, 2 / 3), (0.0, 1.0), (1 / 3, 1.0)]),
        (["parallel=fsdp", "parallel.tensor_ranks=2"], 2, [(0.0, 0.0)] * 2),
        (["parallel=fsdp", "parallel.tensor_ranks=2"], 1, [(0.0, 1.0)]),
    ],
)
def test_a_share_follows_the_layout(compose, folder, words, nodes, expected) -> None:
    config = config_of(compose, folder, *PRETRAINED)
    parallel = compose(*words, "cluster.train.ranks_per_node=4").parallel
    config.parallel = parallel
    config.cluster.train.nodes = nodes
    assert [prefetch.node_fractions(config, node) for node in range(nodes)] == expected


def test_nothing_is_read_when_it_would_not_help(compose, folder, monkeypatch) -> None:
    drawn = config_of(compose, folder, *PRETRAINED)
    drawn.model.init = compose().model.init
    assert bytes_read(monkeypatch, drawn) == []
    absent = config_of(compose, folder / "absent", *PRETRAINED)
    assert bytes_read(monkeypatch, absent) == []
    (folder / "run/checkpoints/step-00000010").mkdir(parents=True)
    assert bytes_read(monkeypatch, config_of(compose, folder, *PRETRAINED)) == []
    adapted = config_of(compose, folder, *PRETRAINED, "adapter=lora")  # the base of an adapter is not in its checkpoint
    assert total(bytes_read(monkeypatch, adapted)) == WHOLE
    monkeypatch.setattr(prefetch.host_memory, "free_bytes", lambda: WHOLE)
    assert bytes_read(monkeypatch, adapted) == []


def test_the_same_files_are_read_as_in_training(compose, folder, monkeypatch) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # left over from another save
    assert total(bytes_read(monkeypatch, config_of(compose, folder, *PRETRAINED))) == WHOLE
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert total(bytes_read(monkeypatch, config_of(compose, folder, *PRETRAINED))) == WHOLE


def test_a_model_of_the_hub_is_read_from_the_cache(compose, folder, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "models--owner--name/snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "models--owner--name/refs").mkdir()
    (folder / "models--owner--name/refs/main").write_text(commit)
    (folder / "model.safetensors").rename(snapshot / "model.safetensors")
    assert total(bytes_read(monkeypatch, put(compose(*PRETRAINED), {"model.source": "owner/name"}))) == WHOLE
    assert bytes_read(monkeypatch, put(compose(*PRETRAINED), {"model.source": "owner/other"})) == []


def test_a_broken_file_is_ignored(compose, folder, monkeypatch) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08" * 20)
    assert bytes_read(monkeypatch, config_of(compose, folder, *PRETRAINED)) == []
