"""jobs/data/tokenized_set.py: the first rows are few, and the longest rows do not stop a build."""

import json
from pathlib import Path

import pytest

from conf.files import read_json
from conf.schema_model import DataSet
from jobs import preprocess
from jobs.data import sources, tokenized_set

CHAT = {"messages": [{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Ten miles."}] * 2_000}
LONG = {
    "chats of 2,000 questions and answers": [CHAT] * 3,
    "a text of ten million characters": [{"text": "once upon a time " * 600_000}],
    "one word of a million characters": [{"text": "a" * 10**6}],
}


def write(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("rows", LONG.values(), ids=LONG)
def test_long_rows_are_compared_and_tokenized(
    rows: list[dict], compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(rows, tmp_path / "rows.jsonl")
    words = ("data.overlong=split", "data.max_length=4096", "data.workers=1", "data.chat_template=chatml")
    limits = [f"data.gates.{name}=1" for name in ("endless", "duplicates", "overlong")]
    held_out = f"data.validation_path={write(rows[:1], tmp_path / 'held.jsonl')}"
    preprocess.run(
        compose(f"run_dir={tmp_path}/run", f"data.path={path}", *words, *limits, held_out, "data.gates.overlap=1")
    )
    assert f"compared on {len(rows)} rows" in capsys.readouterr().out
    (tokenized, _) = read_json(tmp_path / "run/data/data.json")["sets"].values()
    assert tokenized["rows"] == len(rows)
    assert tokenized["samples"] * 4096 >= tokenized["tokens"] >= 100_000


def first_rows(path: Path) -> list[str]:
    return [location for location, _ in tokenized_set._first_rows(sources.read_blocks(DataSet(path=str(path))))]


def test_the_first_rows_end_where_rows_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_set, "FIRST_BYTES", 5_000_000)
    path = write([{"text": "x" * 2_000_000}] * 10, tmp_path / "rows.jsonl")
    assert first_rows(path) == [f"{path}:{number}" for number in (1, 2, 3)]


def test_lines_that_cannot_be_read_do_not_hide_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_set, "FIRST_BYTES", 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("not JSON" + "!" * 2_000_000 + '\n{"text": "a"}\n{"text": "b"}\n')
    assert first_rows(path) == [f"{path}:2", f"{path}:3"]


def test_there_are_300_first_rows(tmp_path: Path) -> None:
    path = write([{"text": "x"}] * 400, tmp_path / "rows.jsonl")
    assert len(first_rows(path)) == tokenized_set.FIRST_ROWS
