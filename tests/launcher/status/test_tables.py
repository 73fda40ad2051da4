"""launcher/status/tables.py: the tables of job states and of a run's result."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from conf.files import write_json
from launcher.status import state as state_module
from launcher.status import status_table, tables
from launcher.status.overview import Overview
from launcher.status.state import JobState


def write_metrics(run: Path) -> None:
    lines: list[dict[str, float]] = [{"step": 0, "eval_loss": 6.5}]
    lines += [{"step": step, "loss": 7.0 - step, "tokens_per_s": 1000.0 * step} for step in (1, 2, 3)]
    lines.append({"step": 3, "eval_loss": 4.25})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_result_has_the_first_and_last_losses(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    assert tables.result_rows(tmp_path)[:4] == [
        ("steps", "3"),
        ("training loss", "6.0000 first, 4.0000 last"),
        ("tokens/s", "2,000 (median step, all ranks)"),
        ("held-out loss", "6.5000 before, 4.2500 after training"),
    ]


def test_the_result_has_the_merged_model_and_an_answer(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(bytes(3 * 2**20))
    (tmp_path / "evaluate.json").write_text(json.dumps({"loss": 4.25, "perplexity": 70.105}))
    answers = [{"prompt": "Who?", "answer": "Nobody."}]
    (tmp_path / "generations.json").write_text(json.dumps({"answers": answers}))
    assert tables.result_rows(tmp_path) == [
        ("merged model", "held-out loss 4.2500, perplexity 70.11"),
        ("model/", "3.0 MiB"),
        ("run", str(tmp_path)),
        ("model", str(tmp_path / "model")),
        ("sample", "Who?\nNobody."),
    ]


def test_the_result_of_an_empty_run_is_its_folder(tmp_path: Path) -> None:
    assert tables.result_rows(tmp_path) == [("run", str(tmp_path))]


def state(**more: Any) -> JobState:
    return JobState(**{"name": "train", "job_id": "7", "state": "RUNNING", "verdict": None, "attempt": 2} | more)


def test_a_running_job_shows_its_last_heartbeat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status_table.show(
        [Overview(Path("run"), [state(beat={"phase": "save", "step": 40, "time": time.time() - 90, "count": 3})])]
    )
    output = capsys.readouterr().out
    assert re.search(r"train +7 +running +2 +40 +save, last heartbeat 9[01] s ago", output)


def test_a_failed_job_shows_the_remedy_and_the_end_of_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict = {
        "status": "nccl",
        "reason": "gone",
        "rank": 3,
        "host": "n2",
        "remedy": "do this",
        "log": "a\nb\nc\nd\ne\nf",
    }
    status_table.show([Overview(Path("run"), [state(state="FAILED", verdict=verdict)])])
    output = capsys.readouterr().out
    assert "rank 3 on n2  gone" in output
    assert output.endswith("train: do this\ntrain, last lines of its log:\n  b\n  c\n  d\n  e\n  f\n")


def test_the_log_of_a_failed_job_does_not_repeat_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    prefix = "2026-11-28 10:00:00 rank 0"
    verdict = {
        **{"status": "user_error", "reason": "data.path: no rows\n  a:1", "rank": 0, "host": "n2", "attempt": 1},
        "log": f"{prefix} INFO format text\n\n{prefix} ERROR data.path: no rows\n{prefix} ERROR   a:1\nlast words",
    }
    failed = state(state="FAILED", verdict=verdict)
    status_table.show([Overview(Path("run"), [failed])])
    status_table.attempts(failed)
    output = capsys.readouterr().out
    assert output.count("data.path: no rows") == output.count("a:1") == 2, "once in each of the two tables"
    assert output.count(f"{prefix} INFO format text") == output.count("last words") == 2


def test_a_run_that_holds_out_nothing_has_no_held_out_loss(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate.json", {"loss": None, "perplexity": None, "tokens": 0, "model": "step-1 in fp32"})
    assert tables.result_rows(tmp_path) == [("run", str(tmp_path))]


def test_the_slowest_running_rank_is_shown(tmp_path: Path) -> None:
    for node, counts in enumerate([(9, 8), (7, 3)]):
        phases = ("train", "ended") if node else ("train", "train")
        ranks = {str(2 * node + rank): {"count": counts[rank], "phase": phases[rank]} for rank in (0, 1)}
        write_json(tmp_path / f"attempt-2/node-{node}.json", {"ranks": ranks})
    assert state_module._slowest_heartbeat(tmp_path, 2) == {"count": 7, "phase": "train"}
    assert state_module._slowest_heartbeat(tmp_path, 3) is None


BRACKETS = [
    "RuntimeError: Gloo connectFullMesh failed with [/__w/pytorch/gloo/pair.cc:152] timed out",
    "[rank1]: NCCL error",
    "KeyError: '[/INST]'",
    "rows [bold]3 to 5[/bold] :smile: [link=http://a.example]",
]


@pytest.mark.site(
    case="An error's text has brackets, as those of Gloo and of chat templates do",
    before="`muster status` left them out, or ended with a traceback",
    after="they are shown as they are",
)
@pytest.mark.parametrize("text", BRACKETS)
def test_brackets_are_shown_as_they_are(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = {"status": "failed", "reason": text, "rank": 1, "host": text, "remedy": text, "log": f"log {text}"}
    job = state(name="train", state="FAILED", verdict=verdict, before=[verdict | {"attempt": 1}])
    status_table.show([Overview(Path("run"), [job])])
    status_table.attempts(job)
    assert capsys.readouterr().out.count(text) == 9
    answers = [{"prompt": f"{text}?", "answer": text}]
    run = tmp_path / "[bold]"
    write_json(run / "generations.json", {"answers": answers})
    tables.show_result(run)
    shown = capsys.readouterr().out
    assert f"{text}?" in shown
    assert shown.count(text) == 2
    assert shown.count("[bold]") == text.count("[bold]") * 2 + 2  # title and folder


@pytest.mark.site(
    case="A log, a row or an answer has terminal escapes (title, clipboard, links, reversed text)",
    before="they were sent to the terminal",
    after="they are shown, as `\\x1b]52;...`",
)
def test_escape_sequences_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\x1b]52;c;cm0=\x07 \u202eabc"
    verdict = {"status": "failed", "reason": text, "rank": 1, "host": "n1", "remedy": text, "log": text, "error": text}
    job = state(name="train", state="FAILED", verdict=verdict)
    status_table.show([Overview(Path("run"), [job])])
    status_table.attempts(job)
    write_json(tmp_path / "generations.json", {"answers": [{"prompt": text, "answer": text}]})
    tables.show_result(tmp_path)
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x07\u202e")
    assert shown.count(r"\x1b]52;c;cm0=\x07 \u202eabc") >= 6
