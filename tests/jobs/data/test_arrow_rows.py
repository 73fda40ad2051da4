"""Rows of Parquet, Arrow and `datasets` are those of JSON Lines: nothing that Arrow filled in is left."""

import datetime
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.errors import DataError
from conf.schema_model import DataSet
from jobs.data import formats, sources
from jobs.data.file_readers import Unreadable


def tool(name: str, **properties: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def answer(name: str, **arguments: object) -> dict[str, object]:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "tool_calls": calls}


ASK = {"role": "user", "content": "Please."}
CALLS = [
    {"tools": [tool("weather", city={"type": "string"})], "messages": [ASK, answer("weather", city="Paris")]},
    {
        "tools": [tool("add", a={"type": "integer", "enum": [1, 2]}, b={"items": {"properties": {"x": {"type": "null"}}}})],
        "messages": [ASK, answer("add", a=1, b=[{"x": 1}, {"y": {"z": [2]}}])],
    },
    {
        "tools": [tool("now"), tool("weather", city={"type": "string", "description": "W"})],
        "messages": [ASK, answer("now"), {"role": "tool", "name": "now", "content": "12"}, {"role": "assistant", "content": "Go."}],
    },
]  # fmt: skip


def read(path: Path, **keys: object) -> list[object]:
    return [row for block in sources.read_blocks(DataSet(str(path), **keys)) for _, row in block.parsed()]  # type: ignore[arg-type]


def write_parquet(table: arrow.Table, folder: Path) -> Path:
    parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def write_stream(table: arrow.Table, folder: Path) -> Path:
    with arrow.ipc.new_stream(folder / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def write_file(table: arrow.Table, folder: Path) -> Path:
    with arrow.ipc.new_file(folder / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def write_hub(table: arrow.Table, folder: Path) -> Path:
    """A copy of a Hub set, which `datasets` loads."""
    parquet.write_table(table, folder / "rows.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.parquet\n---\n")
    return folder


WRITERS = [write_parquet, write_stream, write_file, write_hub]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.mark.parametrize("write", WRITERS)
def test_tools_and_arguments_of_several_schemas_keep_only_their_own_keys(write, tmp_path: Path) -> None:
    table = arrow.Table.from_pylist(CALLS)
    assert "None" in str(table.to_pylist()), "Arrow fills nothing in any more"
    assert read(write(table, tmp_path)) == CALLS


def test_a_call_without_content_gives_the_sample_of_null_content(tmp_path: Path) -> None:
    """Arrow cannot tell an absent content from a null one."""
    rows = json.loads(json.dumps(CALLS[:2]))
    for row in rows:
        row["messages"][1]["content"] = None
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = read(tmp_path / "rows.jsonl")
    stored = read(write_parquet(arrow.Table.from_pylist(rows), tmp_path))
    samples = [[formats.convert(row, "messages") for row in part] for part in (given, stored)]
    assert [[turn.message() for turn in sample.turns] for sample in samples[0]] == [
        [turn.message() for turn in sample.turns] for sample in samples[1]
    ]
    assert [sample.tools for sample in samples[0]] == [sample.tools for sample in samples[1]]


def test_nulls_that_a_row_has_itself_stay(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": {"x": null, "y": [null, {"z": null}]}, "b": null}\n')
    assert read(tmp_path / "rows.jsonl") == [{"a": {"x": None, "y": [None, {"z": None}]}, "b": None}]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{"a": {"b": None}}, None], [{"a": {}}, None]),
        ([{"a": [None, {"x": 1}, {"y": 2}]}, {"b": 1}], [{"a": [None, {"x": 1}, {"y": 2}]}, {"b": 1}]),
        ([[1, None], None], [[1, None], None]),
        (arrow.array([[("a", 1), ("b", None)], None], arrow.map_(arrow.string(), arrow.int64())), [{"a": 1, "b": None}, None]),
        (arrow.array(['{"a": null}', None], arrow.json_()), [{"a": None}, None]),
        ([datetime.date(2026, 11, 28), None], ["2026-11-28", None]),
        ([{"at": datetime.datetime(2026, 11, 28, 10)}], [{"at": "2026-11-28T10:00:00"}]),
        ([datetime.timedelta(seconds=90)], ["0:01:30"]),
        ([Decimal("0.10"), Decimal("3.00"), Decimal("0.12345678901234567890")], [0.1, 3, "0.12345678901234567890"]),
        (arrow.array(["user", "tool"]).dictionary_encode(), ["user", "tool"]),
        (arrow.array([["a"], []], arrow.large_list(arrow.large_string())), [["a"], []]),
        (arrow.array([[{"x": 1, "y": None}]], arrow.list_(arrow.struct({"x": arrow.int8(), "y": arrow.int8()}), 1)), [[{"x": 1}]]),
    ],
    ids=[
        *("empty struct", "items of a list", "list", "map", "JSON", "date", "time in a struct", "duration"),
        *("decimals", "dictionary", "large list", "list of fixed size"),
    ],
)  # fmt: skip
def test_every_type_becomes_what_json_would_give(values, expected, tmp_path: Path) -> None:
    table = arrow.table({"value": values})
    assert [row["value"] for row in read(write_stream(table, tmp_path))] == expected


def test_json_text_in_a_column_is_not_touched(tmp_path: Path) -> None:
    table = arrow.table({"messages": ['[{"role": "user", "content": null}]']})
    assert read(write_parquet(table, tmp_path)) == table.to_pylist()


def test_a_map_that_has_a_key_twice_is_unreadable(tmp_path: Path) -> None:
    kind = arrow.map_(arrow.string(), arrow.int64())
    rows = read(write_stream(arrow.table({"value": arrow.array([[("a", 1), ("a", 2)], [("a", 1)]], kind)}), tmp_path))
    assert isinstance(rows[0], Unreadable)
    assert "column value that cannot be read: a map has a key twice" in str(rows[0])
    assert rows[1] == {"value": {"a": 1}}


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["output", "output"])
    with pytest.raises(DataError, match="has the column 'output' twice"):
        read(write_stream(table, tmp_path))
