"""Compares every layout with the reference over twenty steps on four ranks, then the consolidated model with the trained one."""

import json

import pytest
from safetensors.torch import load_file

from conf import resolve
from launcher.status import log_files
from tests.jobs import ranks, reference

STEPS = 20
LAYOUTS = {
    **{name: [f"parallel={name}"] for name in ("ddp", "zero1", "zero2", "zero3", "fsdp", "zero3_offload", "fsdp_offload")},
    "hsdp": ["parallel=hsdp", "parallel.shard_ranks=2"],
    "fsdp_context": ["parallel=fsdp", "parallel.context_ranks=2"], "fsdp_tensor": ["parallel=fsdp", "parallel.tensor_ranks=2"],
    "zero3_context": ["parallel=zero3", "parallel.context_ranks=2"],
}  # fmt: skip
QUICK = ("zero3",)
"""`make test` runs all jobs of these layouts; tests/jobs/backends/test_numerics.py compares every layout with its reference."""


def some(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.proof) for name in names]


COMMON = [
    "cluster.train.ranks_per_node=4", "train.global_batch=16", "train.micro_batch=2", f"train.steps={STEPS}",
    "train.warmup_steps=5", "train.weight_decay=0.1", "train.learning_rate=3e-3", "train.precision=fp32", "train.fingerprint=true",
    "cluster.train.gpus_per_node=0", "cluster.inference.gpus_per_node=0", "data.max_rows=240",
    "train.eval_every=0", "train.log_every=5",
    "jobs=[preprocess,train,consolidate,evaluate]",
]  # fmt: skip


LORA = ["adapter=lora", "model=hub", "train.learning_rate=1e-2"]


def _reference(folder, *words):
    """The reference curve of a config, computed on rows that the preprocess job wrote."""
    ranks.run(f"run_dir={folder}", *COMMON, *words, "jobs=[preprocess]")
    return reference.curve(resolve.load(folder / "config.yaml"), folder, STEPS)


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    return _reference(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small trained model, as a Hugging Face folder."""
    run = tmp_path_factory.mktemp("base") / "run"
    ranks.run(f"run_dir={run}", *COMMON, "jobs=[preprocess,train,consolidate]")
    return run / "model"


@pytest.fixture(scope="module")
def lora_curve(base, tmp_path_factory):
    return _reference(tmp_path_factory.mktemp("lora") / "run", *LORA, f"model.source={base}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", some(LAYOUTS))
def test_layout_equals_the_reference(layout, curve, tmp_path) -> None:
    ranks.run(f"run_dir={tmp_path}/run", *COMMON, *LAYOUTS[layout])
    check(tmp_path / "run", curve)


@pytest.mark.proof
@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_packed_rows_equal_the_reference(layout, tmp_path) -> None:
    words = ["data.packing=true", "data.max_length=128"]
    ranks.run(f"run_dir={tmp_path}/run", *COMMON, *words, f"parallel={layout}")
    check(tmp_path / "run", _reference(tmp_path / "reference", *words))


@pytest.mark.slow
@pytest.mark.parametrize("layout", some(["fsdp", "hsdp", "zero2", "zero3"]))
def test_lora_equals_the_reference(layout, lora_curve, base, tmp_path) -> None:
    run = tmp_path / "run"
    ranks.run(f"run_dir={run}", *COMMON, *LORA, f"model.source={base}", *LAYOUTS[layout])
    check(run, lora_curve)
    assert (
        _size(run / "checkpoints") < _size(base) * 3
    )  # checkpoints have adapters and their moments only, not the base


@pytest.mark.proof
@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_an_untouched_bf16_base_keeps_its_loss_under_adapters(layout, base, tmp_path) -> None:
    """torch 2.11 silently gathers wrong values for a frozen bf16 base and fp32 adapters in one FSDP group."""
    run = tmp_path / "run"
    words = [*COMMON, *LORA, f"model.source={base}", "train.precision=bf16", "train.steps=1", "train.warmup_steps=0"]
    ranks.run(f"run_dir={run}", *words, f"parallel={layout}", "jobs=[preprocess,train]")
    before = [
        json.loads(line)["eval_loss"]
        for line in (base.parent / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" in line
    ]
    after = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["eval_loss"]
    assert after == pytest.approx(before[-1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("layout", some(["zero1", "zero2", "zero3", "fsdp"]))
def test_fp32_masters_of_bf16_training_are_consolidated_bit_for_bit(layout, tmp_path) -> None:
    words = [*COMMON, "train.precision=bf16", "train.steps=4", "train.warmup_steps=1", f"parallel={layout}"]
    shown = ranks.run(f"run_dir={tmp_path}/run", *words, "jobs=[preprocess,train,consolidate]")
    assert "38 weights equal those in training, bit for bit" in shown


def _size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check(run, curve):
    """Losses and gradient norms within 2e-3 of the reference; consolidated weights and their loss equal the live ones."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line, (loss, norm) in zip(steps, curve, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=2e-3)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-3)
    fingerprint = json.loads((run / f"checkpoints/step-{STEPS:08d}/fingerprint.json").read_text())
    assert len(fingerprint) >= 38  # every weight of the tiny model, or both matrices of every adapter
    assert "weights equal those in training, bit for bit" in log_files.newest(run, "consolidate", 0).read_text()
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert json.loads((run / "evaluate.json").read_text())["loss"] == pytest.approx(held_out[-1], abs=1e-3)
    merged = {key: value for path in run.glob("model/*.safetensors") for key, value in load_file(path).items()}
    assert merged["model.embed_tokens.weight"].shape == (1024, 128)
