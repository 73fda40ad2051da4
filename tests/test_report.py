"""launcher/report.py: the table at the end of a run, from whatever its jobs have left."""

import json
from pathlib import Path

from launcher import report


def write_metrics(run: Path) -> None:
    lines: list[dict[str, float]] = [{"step": 0, "eval_loss": 6.5}]
    lines += [{"step": step, "loss": 7.0 - step, "tokens_per_s": 1000.0 * step} for step in (1, 2, 3)]
    lines.append({"step": 3, "eval_loss": 4.25})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_training_is_told_by_its_first_and_last_losses(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    assert report.rows(tmp_path)[:4] == [
        ("steps", "3"),
        ("training loss", "6.0000 first, 4.0000 last"),
        ("tokens/s", "2,000 (median step, all ranks)"),
        ("held-out loss", "6.5000 before, 4.2500 after training"),
    ]


def test_the_merged_model_is_told_with_its_folder_and_an_answer(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(bytes(3 * 2**20))
    (tmp_path / "evaluate.json").write_text(json.dumps({"loss": 4.25, "perplexity": 70.105}))
    (tmp_path / "generate.json").write_text(json.dumps([{"prompt": "Who?", "answer": "Nobody."}]))
    assert report.rows(tmp_path) == [
        ("merged model", "held-out loss 4.2500, perplexity 70.11"),
        ("model/", "3.0 MiB"),
        ("run", str(tmp_path)),
        ("model", str(tmp_path / "model")),
        ("sample", "Who?\nNobody."),
    ]


def test_a_run_of_which_nothing_is_left_has_only_its_folder(tmp_path: Path) -> None:
    assert report.rows(tmp_path) == [("run", str(tmp_path))]
