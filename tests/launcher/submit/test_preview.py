"""launcher/submit/preview.py: the line that says how much is trained in a step."""

from pathlib import Path

import pytest

from conf.files import write_json
from launcher.run_folder import record
from launcher.submit import preview
from tests.conftest import Compose


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["cluster=local", "train.micro_batch=4"], ["of 64 rows (4 x 8 accumulated x 2 ranks)", "on the CPU"]),
        (
            ["cluster=slurm", "train.steps=200"],
            ["200 steps of 64 rows", "x 32 ranks)", "warmup 10 steps", "on 32 GPUs"],
        ),
        (
            ["cluster=slurm", "model=llama8b", "parallel.context_ranks=4"],
            ["x 8 groups of 4 ranks)", "at most 131,072 tokens a step", "max_length 2,048", "precision auto"],
        ),
        (["data.packing=true", "data.max_length=1024"], [", 65,536 tokens a step"]),
        (["train.lr_schedule=constant", "train.learning_rate=1e-4"], ["learning rate 0.0001 constant, warmup none"]),
        (["train.warmup_ratio=0.03", "train.optimizer=adafactor"], ["warmup 3 % of the steps, adafactor"]),
    ],
)
def test_the_line_says_what_a_step_is(compose: Compose, words: list[str], parts: list[str]) -> None:
    line = preview.training(compose("data=jsonl", "data.path=x.jsonl", *words))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("epochs", "rows", "expected"),
    [
        ("6", None, "6 epochs in steps of 64 rows"),
        ("0.5", None, "; how many steps these are is known after preprocess"),
        ("6", 1502, "6 epochs: 141 steps of 64 rows"),
        ("1", 3, "1 epoch: 1 step of 64 rows"),
    ],
)
def test_epochs_are_steps_once_the_rows_are_known(
    compose: Compose, epochs: str, rows: int | None, expected: str
) -> None:
    config = compose("data=jsonl", "data.path=x.jsonl", "train.steps=null", f"train.epochs={epochs}")
    assert expected in preview.training(config, rows)


def test_the_rows_of_a_prepared_run_are_read_unless_they_are_packed(compose: Compose, tmp_path: Path) -> None:
    config = compose("data=jsonl", "data.path=x.jsonl")
    config.run_dir = str(tmp_path)
    assert record.training_rows(config) is None
    write_json(tmp_path / "data/data.json", {"train": {"samples": 1502}})
    assert record.training_rows(config) == 1502
    config.data.packing = True
    assert record.training_rows(config) is None
