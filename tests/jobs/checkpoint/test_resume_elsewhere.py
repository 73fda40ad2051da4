"""A run that resumes with other ranks or in another layout: the same rows, the same losses, each sample once an epoch."""

import json
import re
import shutil

import pytest

from conf.files import read_json
from tests.jobs import ranks
from tests.jobs.backends.test_layouts import COMMON

pytestmark = pytest.mark.slow
WORDS = [*COMMON, "train.steps=8", "train.save_every=4", "train.keep_checkpoints=3", "jobs=[preprocess,train]"]
ELSEWHERE = {
    "fsdp on half the ranks": ["fsdp", "cluster.train.ranks_per_node=2"],
    "fsdp to hsdp": ["fsdp", "parallel=hsdp", "parallel.shard_ranks=2"],
    "fsdp on one rank to plain data parallelism": ["fsdp", "parallel=ddp", "cluster.train.ranks_per_node=1"],
    "zero3 on half the ranks": ["zero3", "cluster.train.ranks_per_node=2"],
    "zero3 to zero1": ["zero3", "parallel=zero1"],
    "fsdp to slices of matrices": ["fsdp", "parallel.tensor_ranks=2"],
    "slices of matrices to fsdp": ["fsdp parallel.tensor_ranks=2", "parallel.tensor_ranks=1"],
}
PROOF = (
    "fsdp on half the ranks",
    "fsdp to hsdp",
    "fsdp on one rank to plain data parallelism",
    "zero3 to zero1",
    "fsdp to slices of matrices",
    "slices of matrices to fsdp",
)
CHAINS = {
    "fsdp": ["fsdp", ["fsdp", 2], ["fsdp", 6]],
    "zero1": ["zero1", ["zero1", 2], ["zero1", 6]],
    "zero2": ["zero2", ["zero2", 2], ["zero2", 6]],
    "zero3": ["zero3", ["zero3", 2], ["zero3", 6]],
    "zero3 to fsdp and back": ["zero3", ["fsdp", 4], ["zero3", 4]],
    "zero2 to zero3 to fsdp": ["zero2", ["zero3", 6], ["fsdp", 2]],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of eight steps on four ranks that still have their checkpoint of step 4. Each layout runs once; do not change it."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def made(layout):
        run = folder / re.sub(r"\W", "-", layout) / "run"
        if not run.exists():
            ranks.run(f"run_dir={run}", *WORDS, *f"parallel={layout}".split())
        return run

    return made


def history(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"], line["tokens"]) for line in lines if "loss" in line]


def rewind(run, step):
    """Make the run look as if it had been killed after it saved at `step`."""
    for path in (run / "checkpoints").glob("step-*"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    shutil.rmtree(run / "jobs/train")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def check(before, after, since, rel):
    """From step `since` on, losses and gradient norms are close; before it, and for tokens, the numbers are identical."""
    assert len(after) == len(before)
    assert after[:since] == before[:since]
    for one, other in zip(before[since:], after[since:], strict=True):
        assert one[2] == other[2]  # the same rows
        assert other[:2] == pytest.approx(one[:2], rel=rel)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.proof) if name in PROOF else name for name in ELSEWHERE]
)
def test_it_goes_on_from_step_4_as_if_nothing_had_changed(case, finished, tmp_path) -> None:
    layout, *words = ELSEWHERE[case]
    kept, run = finished(layout), tmp_path / "copy/run"
    shutil.copytree(kept.parent, run.parent, symlinks=True)  # with the tokenized set beside it
    rewind(run, 4)
    said = ranks.run(f"resume={run}", *words)
    assert f"from {layout.split()[0]} on 4 ranks to" in said
    check(history(kept), history(run), 4, rel=2e-3)
    info = read_json(run / "checkpoints/step-00000008/checkpoint.json")
    assert info["rows_seen"] == 8 * 16


@pytest.mark.proof
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("case", CHAINS)
def test_twice_elsewhere_keeps_the_curve(case, adapter, tmp_path) -> None:
    first, *hops = CHAINS[case]
    run, words = tmp_path / "run", ["train.steps=12", "train.keep_checkpoints=4", "train.global_batch=24"]
    ranks.run(f"run_dir={run}", *WORDS, *words, f"adapter={adapter}", f"parallel={first}")
    before = history(run)
    for step, (layout, number) in zip((4, 8), hops, strict=True):
        rewind(run, step)
        ranks.run(f"resume={run}", f"parallel={layout}", f"cluster.train.ranks_per_node={number}")
    check(before, history(run), 4, rel=1e-3)
    assert read_json(run / "checkpoints/step-00000012/checkpoint.json")["rows_seen"] == 12 * 24
