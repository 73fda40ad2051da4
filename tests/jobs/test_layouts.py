"""Every layout against the reference: twenty steps on four real ranks, then the consolidated model against the live one."""

import json

import pytest
from safetensors.torch import load_file

from conf import resolve
from tests.jobs import reference

STEPS = 20
LAYOUTS = {
    "ddp": [], "zero1": [], "zero2": [], "zero3": [], "fsdp": [], "hsdp": ["parallel.shard_ranks=2"],
    "zero3_offload": [], "fsdp_offload": [],
}  # fmt: skip
COMMON = [
    "cluster.train.ranks_per_node=4", "train.global_batch=16", "train.micro_batch=2", f"train.steps={STEPS}",
    "train.warmup_steps=5", "train.weight_decay=0.1", "train.learning_rate=3e-3", "train.precision=fp32", "train.fingerprint=true",
    "cluster.train.gpus_per_node=0", "cluster.inference.gpus_per_node=0", "data.max_rows=240",
    "train.eval_every=0", "train.log_every=5",
    "jobs=[preprocess,train,consolidate,evaluate]",
]  # fmt: skip


@pytest.fixture(scope="module")
def curve(tmp_path_factory, launch):
    """The reference curve, and the rows it was computed on."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = launch(f"run_dir={run}", *COMMON, "jobs=[preprocess]")
    assert done.returncode == 0, done.stderr
    return reference.curve(resolve.load(run / "config.yaml"), run, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_the_reference(layout, curve, tmp_path, launch):
    run = tmp_path / "run"
    done = launch(f"run_dir={run}", *COMMON, f"parallel={layout}", *LAYOUTS[layout])
    assert done.returncode == 0, done.stdout + done.stderr
    check(run, curve)


def check(run, curve):
    """Losses and gradient norms within 2e-3 of the reference; consolidated weights and their loss equal the live ones."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line, (loss, norm) in zip(steps, curve, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=2e-3)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-3)
    fingerprint = json.loads((run / f"checkpoints/step-{STEPS:08d}/fingerprint.json").read_text())
    assert len(fingerprint) >= 38
    assert (
        "weights equal those in training, bit for bit"
        in next((run / "jobs/consolidate").glob("*_0_log.out")).read_text()
    )
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert json.loads((run / "evaluate.json").read_text())["loss"] == pytest.approx(held_out[-1], abs=1e-3)
    merged = load_file(run / "model/model.safetensors")
    assert merged["model.embed_tokens.weight"].shape == (1024, 128)
