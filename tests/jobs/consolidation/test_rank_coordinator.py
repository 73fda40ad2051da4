"""Several processes share a merge: same bytes as from one, rank 0 names a rank that fails, a killed job can be restarted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed.checkpoint as dcp

from jobs.consolidation import plan, rank_coordinator
from jobs.tensor_io import dtypes
from jobs.tensor_io.layout import StoredTensor
from tests.conftest import ROOT
from tests.jobs import shards
from tests.jobs.consolidation.test_external import contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "fsdp"
    dcp.save({"model": shards.build("gqa").state_dict()}, checkpoint_id=folder, no_dist=True)
    return folder


def start(rank, size, source, out):
    words = [source, "--out", out, "--shard-gib", "0.00003", "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.consolidate", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*started):
    """(exit code, output) of each process."""
    outputs = ["".join(one.communicate(timeout=120)) for one in started]
    return [(one.returncode, text) for one, text in zip(started, outputs, strict=True)]


def test_three_processes_write_what_one_does(checkpoint, tmp_path) -> None:
    found = ended(*(start(rank, 3, checkpoint, tmp_path / "three") for rank in (2, 1, 0)))
    assert [code for code, _ in found] == [0, 0, 0], found
    assert all("and wrote 0.00 GB" in text for _, text in found)
    assert [code for code, _ in ended(start(0, 1, checkpoint, tmp_path / "one"))] == [0]
    three, one = contents(tmp_path / "three"), contents(tmp_path / "one")
    assert len([name for name in one if name.endswith(".safetensors")]) > 3
    assert {name: value for name, value in three.items() if name != "README.md"} == {
        name: value for name, value in one.items() if name != "README.md"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]


def test_a_rank_that_fails_is_named_and_nothing_is_published(checkpoint, tmp_path) -> None:
    """Two nodes see different files."""
    subprocess.run(["cp", "-r", checkpoint, tmp_path / "other"], check=True)
    shard = next((tmp_path / "other").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes() + b"longer")
    lead, other = ended(start(0, 2, checkpoint, tmp_path / "out"), start(1, 2, tmp_path / "other", tmp_path / "out"))
    assert lead[0] == other[0] == 2
    assert "rank=1: found another checkpoint" in lead[1] and "rank 0 has ended" in other[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.proof
def test_a_killed_job_can_be_restarted(checkpoint, tmp_path) -> None:
    """Files that killed ranks left in the folder of the coordinator are ignored."""
    for number in range(3):
        started = [start(rank, 2, checkpoint, tmp_path / "out") for rank in (0, 1)]
        coordinator = tmp_path / ".out.ranks"
        while not (coordinator / ("hello-1.json", "shares.json", "done-1.json")[number]).exists():
            time.sleep(0.002)
            if all(one.poll() is not None for one in started):
                break  # the merge ended before we saw the file
        for one in started:
            one.send_signal(signal.SIGKILL)
        ended(*started)
        if (tmp_path / "out").exists():
            subprocess.run(["rm", "-r", tmp_path / "out"], check=True)
    assert [code for code, _ in ended(*(start(rank, 2, checkpoint, tmp_path / "out") for rank in (0, 1)))] == [0, 0]
    ended(start(0, 1, checkpoint, tmp_path / "one"))
    assert (tmp_path / "out/muster.json").read_bytes() == (tmp_path / "one/muster.json").read_bytes()
    assert not coordinator.exists()


def test_files_are_assigned_by_the_work_left() -> None:
    outputs = [plan.Output(f"{size}", (size, 1000), dtypes.BF16, f"{size}") for size in (9, 8, 7, 6, 5, 4)]
    sources = {
        output.source: StoredTensor(output.shape, dtypes.FP32, (), 1)  # no byte is read
        for output in outputs
    }
    made = plan.make_plan(outputs, sources, shard_bytes=1)
    names = list(made.sizes)
    found = rank_coordinator.assign(made, set(), 2)
    assert {rank: sum(made.sizes[name] for name in names if found[name] == rank) // 2000 for rank in (0, 1)} == {
        0: 26,
        1: 25,
    }
    done = set(names[:3])
    found = rank_coordinator.assign(made, done, 2)
    assert sorted(found[name] for name in names[3:]) == [0, 1, 1] and found.keys() == set(names)
