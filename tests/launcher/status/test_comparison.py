"""`muster compare`: on run folders made by hand, whose figures are known."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf.files import write_json
from launcher import __main__ as muster
from launcher.status import comparison
from tests.pages.html import EVIL, parsed

CONFIG = """name: {name}
run_dir: /runs/{name}
train:
  steps: 40
  learning_rate: {rate}
  unfrozen: []
data:
  path: {data}
cluster:
  train:
    nodes: 1
    gpus_per_node: {gpus}
"""


def run_folder(folder: Path, *, rate: str = "0.001", data: str = "a.jsonl", gpus: int = 8, lift: float = 0.0) -> Path:
    """A run of 40 steps with losses 40 / step + lift, held-out losses at steps 20 and 40, and 100 tokens/s on 8 ranks."""
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"launches": []})
    (folder / "config.yaml").write_text(CONFIG.format(name="x", rate=rate, data=data, gpus=gpus))
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 40 / step + lift,
            "learning_rate": 1e-3,
            "tokens_per_s": 800.0,
            "tokens_per_s_per_rank": 100.0,
            "time": 1000.0 + step,
        }
        for step in range(1, 41)
    ]
    lines += [
        {"step": 20, "eval_loss": 1.5 + lift, "time": 1100.0},
        {"step": 40, "eval_loss": 1.75 + lift, "time": 1200.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    attempt(folder, 1, 1000.0, 4600.0, "completed")
    return folder


def attempt(run: Path, number: int, started: float, ended: float | None, status: str = "completed") -> None:
    folder = run / "jobs/train"
    (folder / f"attempt-{number}").mkdir(parents=True)
    write_json(folder / f"attempt-{number}/begin.json", {"started": started, "host": "n1"})
    if ended:
        write_json(
            folder / f"attempt-{number}.json", {"status": status, "started": started, "ended": ended, "step": 40}
        )


def compare(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = muster.main(["compare", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def page_data(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_runs_are_compared_in_a_table_and_on_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_folder(tmp_path / "runs/low", rate="0.001")
    second = run_folder(tmp_path / "runs/high", rate="0.1", lift=1.0)
    page = tmp_path / "compare.html"
    code, shown, _ = compare(capsys, first, second, "--cost", "2.5", "--out", page)
    assert code == 0
    rows = [line.split() for line in shown.splitlines()]
    assert rows[1] == ["low", "1.5000", "20", "1.0000", "40/40", "800", "8", "20.00", "completed", "0.001"]
    assert rows[2] == ["high", "2.5000", "20", "2.0000", "40/40", "800", "8", "20.00", "completed", "0.1"]
    assert "train.learning_rate" in shown
    assert "note" not in shown
    charts = {chart["title"]: chart["series"] for chart in page_data(page)["charts"]}
    assert list(charts) == ["Training loss", "Held-out loss", "Learning rate", "Speed"]
    assert [series["name"] for series in charts["Training loss"]] == ["low", "high"]
    assert charts["Training loss"][0]["x"] == list(range(1, 41))
    assert charts["Training loss"][0]["y"][:2] == [40.0, 20.0]
    assert charts["Held-out loss"][1] | {"look": 1} == charts["Held-out loss"][1]
    assert (charts["Held-out loss"][1]["x"], charts["Held-out loss"][1]["y"]) == ([20, 40], [2.5, 2.75])
    assert not re.search(r"src=|url\(|@import|fetch\(|https:", page.read_text())


def test_the_page_refreshes_until_no_run_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, page = run_folder(tmp_path / "a"), run_folder(tmp_path / "b"), tmp_path / "c.html"
    code, shown, _ = compare(capsys, first, second, "--out", page, "--watch")
    assert code == 0 and "written every 30 s" in shown and shown.count("completed") == 2
    assert page_data(page)["refresh_s"] == 0 and "refresh every" not in page.read_text()
    attempt(second, 2, 5000.0, None)
    compare(capsys, first, second, "--out", page)
    assert page_data(page)["refresh_s"] == 30 and "refresh every 30 s" in page.read_text()


def test_a_folder_of_runs_counts_as_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/run", "b/run"):
        run_folder(tmp_path / "sweep" / name)
    code, shown, _ = compare(capsys, tmp_path / "sweep", "--out", tmp_path / "c.html", "--json")
    found = json.loads(shown)
    assert code == 0
    assert [one["name"] for one in found["runs"]] == ["a/run", "b/run"]
    assert found["differing_keys"] == {}
    assert found["runs"][0] | {"best_held_out_loss": 1.5, "best_step": 20, "gpu_hours": 8.0} == found["runs"][0]
    assert "All keys are the same" in (tmp_path / "c.html").read_text()


def test_gpu_hours_count_every_attempt_with_its_ranks(tmp_path: Path) -> None:
    """An hour on the 8 ranks of the metrics, half an hour on the 16 GPUs of the config, and 40 s until a kill."""
    run = run_folder(tmp_path / "run", gpus=16)
    attempt(run, 2, 10_000.0, 11_800.0, "preempted")
    attempt(run, 3, 20_000.0, None)
    with (run / "metrics.jsonl").open("a") as file:
        line = {"step": 42, "loss": 1.0, "tokens_per_s": 400.0, "tokens_per_s_per_rank": 100.0, "time": 20_040.0}
        file.write("\n" + json.dumps(line) + "\n")
    [read, _] = comparison.read([run, run_folder(tmp_path / "other")])
    assert read.gpu_hours == pytest.approx(8 + 8 + 4 * 40 / 3600)
    assert read.status == "no verdict yet"


def test_no_gpu_has_no_gpu_hours_and_no_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_folder(tmp_path / name, gpus=0) for name in "ab"]
    _, shown, _ = compare(capsys, *runs, "--cost", "2", "--out", tmp_path / "c.html")
    assert "GPU-hours" not in shown.splitlines()[0]
    assert "no run has used GPUs" in shown


def test_other_data_are_a_reason_for_caution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_folder(tmp_path / name, data=f"{name}.jsonl") for name in "ab"]
    _, shown, _ = compare(capsys, *runs, "--out", tmp_path / "c.html")
    assert "the runs differ in data.path" in shown
    assert "the runs differ in data.path" in (tmp_path / "c.html").read_text()


def test_a_long_run_is_read_in_part_with_all_its_evaluations(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    lines = [{"step": step, "loss": 1.0} for step in range(1, 20_001)]
    lines += [{"step": step, "eval_loss": 2.0 - step / 20_000} for step in range(7, 20_001, 1000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [read, _] = comparison.read([run, run_folder(tmp_path / "other")])
    assert read.every == 26
    assert len(read.lines) < comparison.MOST_LINES + 30
    assert (read.last, read.best) == ((19_995, 1.0), (19_007, 2.0 - 19_007 / 20_000))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["here"], "is only one run"),
        (["here", "gone"], "is not a run folder"),
        (["here", "broken"], "config.yaml: cannot be read"),
        (["here", "other", "--cost", "nan"], "is not a price"),
        (["here", "other", "--cost", "-1"], "is not a price"),
        (["here", "other", "--out", "here"], "--out=here: cannot be written"),
        (["here", "other", "--out", "here/config.yaml/x"], "--out=here/config.yaml/x: cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "here")
    run_folder(tmp_path / "other")
    (run_folder(tmp_path / "broken") / "config.yaml").write_text("a: [b: }")
    try:
        code, _, error = compare(capsys, *words)
    except SystemExit as refused:
        code, error = int(str(refused.code)), capsys.readouterr().err
    assert code == 2
    assert message in error.replace("broken/", "")
    assert not (tmp_path / "compare.html").exists()


def test_names_values_and_records_of_others_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = EVIL.replace("/", "\u2215") + "\x1b]0;x\x07"
    first = run_folder(tmp_path / name, data=json.dumps(EVIL + "\x1b[2J</script>"))
    hostile = [
        {"step": "1", "loss": 1.0},
        {"step": 1, "loss": "NaN", "time": "now", "tokens_per_s": [1]},
        {"step": 2, "loss": 10**400, "eval_loss": 1.0, "tokens_per_s_per_rank": {}},
    ]
    second = run_folder(tmp_path / "b")
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in hostile) + "[" * 99_999)
    write_json(
        second / "jobs/train/attempt-1.json", {"status": EVIL, "started": "x", "ended": float("nan"), "step": []}
    )
    page = tmp_path / "c.html"
    code, shown, error = compare(capsys, first, second, "--out", page)
    assert code == 0, error
    assert "\x1b" not in shown and "\x07" not in shown
    text = page.read_text(encoding="utf-8")
    found = parsed(text)
    assert [tag for tag, _ in found.tags if tag in ("img", "link", "iframe")] == []
    assert [values for tag, values in found.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert re.search(r"<td[^<>]*>&lt;script&gt;alert", text)
    assert page_data(page)["charts"][0]["series"][0]["name"] == name


def test_twenty_long_runs_make_a_page_below_a_megabyte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        run = run_folder(tmp_path / "sweep" / f"a run with a rather long name, number {number}")
        lines = [
            {"step": n, "loss": 1 / n, "learning_rate": 1 / (n + 7), "tokens_per_s": 1e5 / (n + 3), "eval_loss": 3 / n}
            for n in range(1, 1001)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare(capsys, tmp_path / "sweep", "--out", tmp_path / "c.html")
    assert (tmp_path / "c.html").stat().st_size < 1_000_000
