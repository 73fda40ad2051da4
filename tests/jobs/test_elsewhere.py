"""A run that goes on with other ranks, or in another layout: the same rows, the same losses, every sample once an epoch."""

import json
import shutil

import pytest

from conf.files import read_json
from tests.jobs import ranks
from tests.jobs.test_layouts import COMMON

pytestmark = pytest.mark.slow
WORDS = [*COMMON, "train.steps=8", "train.save_every=4", "train.keep_checkpoints=3", "jobs=[preprocess,train]"]
ELSEWHERE = {
    "fsdp on half the ranks": ["cluster.train.ranks_per_node=2"],
    "fsdp to hsdp": ["parallel=hsdp", "parallel.shard_ranks=2"],
    "fsdp on one rank to plain data parallelism": ["parallel=ddp", "cluster.train.ranks_per_node=1"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight steps on four ranks that still has its checkpoint of step 4."""
    run = tmp_path_factory.mktemp("elsewhere") / "run"
    ranks.run(f"run_dir={run}", *WORDS, "parallel=fsdp")
    shutil.copytree(run, run.with_name("kept"), symlinks=True)
    return run


def history(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"], line["tokens"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("words", ELSEWHERE.values(), ids=ELSEWHERE)
def test_it_goes_on_from_step_4_as_if_nothing_had_changed(words, finished):
    kept = finished.with_name("kept")
    shutil.rmtree(finished)
    shutil.copytree(kept, finished, symlinks=True)
    shutil.rmtree(finished / "checkpoints/step-00000008")
    shutil.rmtree(finished / "jobs/train")
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    said = ranks.run(f"resume={finished}", *words)
    assert "resumed from" in said
    assert "from fsdp on 4 ranks to" in said
    before, after = history(kept), history(finished)
    assert len(after) == 8
    assert after[:4] == before[:4]
    for one, other in zip(before[4:], after[4:], strict=True):
        assert one[2] == other[2]  # the very rows
        assert other[:2] == pytest.approx(one[:2], rel=2e-3)
    about = read_json(finished / "checkpoints/step-00000008/checkpoint.json")
    assert about["rows_seen"] == 8 * 16
