"""launcher/submit/preview.py: the line that says how much is trained in a step."""

import pytest

from launcher.submit import preview
from tests.conftest import Compose


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["cluster=local", "train.micro_batch=4"], ["in steps of 64 rows (4 x 8 accumulated x 2 ranks)", "on the CPU"]),
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
