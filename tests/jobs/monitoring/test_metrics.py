"""All attempts of a run write one record, with every step once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.schema import Tracker
from jobs.distributed.process_group import World
from jobs.monitoring.metrics import Metrics


def metrics(run: Path, first_step: int, rank: int = 0) -> Metrics:
    config: Any = SimpleNamespace(run_dir=str(run), name="tiny", tracker=Tracker())
    return Metrics(config, World(rank, 2, rank, 2, torch.device("cpu")), last_step=10, first_step=first_step)


def attempt(run: Path, first: int, last: int, resumed: int) -> None:
    """Write steps `first` to `last`, as an attempt does that resumes from the checkpoint of step `resumed`."""
    writer = metrics(run, resumed)
    for step in range(first, last + 1):
        writer.write(step, loss=1.0 / step)
        if step % 5 == 0:
            writer.write(step, eval_loss=2.0 / step)
    writer.close()


def steps_with(run: Path, key: str) -> list[int]:
    return [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 8, resumed=0)
    attempt(tmp_path, 6, 7, resumed=5)
    attempt(tmp_path, 8, 10, resumed=7)
    assert steps_with(tmp_path, "loss") == list(range(1, 11))
    assert steps_with(tmp_path, "eval_loss") == [5, 10]


@pytest.mark.parametrize("text", ['{"step": 3, "lo', "5\n", "[1]\n", '{"step": null}\n'])
def test_a_line_that_is_none_is_dropped(tmp_path: Path, text: str) -> None:
    attempt(tmp_path, 1, 4, resumed=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(text)
    attempt(tmp_path, 4, 6, resumed=3)
    assert steps_with(tmp_path, "loss") == list(range(1, 7))


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 4, resumed=0)
    attempt(tmp_path, 1, 2, resumed=0)
    assert steps_with(tmp_path, "loss") == [1, 2]


@pytest.mark.parametrize(("resumed", "evaluated"), [(4, set()), (5, {5}), (7, {5})])
def test_evaluated_steps_are_read_from_the_record(tmp_path: Path, resumed: int, evaluated: set[int]) -> None:
    attempt(tmp_path, 1, 8, resumed=0)
    writer = metrics(tmp_path, resumed)
    writer.close()
    assert set(writer.held_out_losses) == evaluated


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = metrics(tmp_path, 0, rank=1)
    writer.write(1, loss=1.0)
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The config of these tests lacks what the page shows."""
    attempt(tmp_path, 1, 2, resumed=0)
    assert "report.html: cannot be written (AttributeError" in caplog.text
    assert steps_with(tmp_path, "loss") == [1, 2]
