"""Entries of LLaMA-Factory's dataset_info.json become sets with the same rows, columns and roles, or are refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf import datasets
from conf.choices import Format
from conf.errors import DataError
from conf.schema_model import Data, DataSet
from jobs.data import formats, sources

CHAT = {
    "file_name": "chat.json",
    "formatting": "sharegpt",
    "columns": {"messages": "dialog", "system": "sys", "tools": "funcs"},
    "tags": {
        "role_tag": "who",
        "content_tag": "said",
        "user_tag": "customer",
        "assistant_tag": "agent",
        "function_tag": "call",
        "observation_tag": "result",
    },
}
OPENAI = {
    "file_name": "openai.json",
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}  # fmt: skip
ENTRIES: dict[str, Any] = {
    "chat": CHAT,
    "openai": OPENAI,
    "plain": {"file_name": "plain.json", "file_sha1": "0" * 40},
    "named": {"file_name": "named.json", "columns": {"prompt": "q", "query": "more", "response": "a", "history": "before"}},
    "pretraining": {"file_name": "text.json", "columns": {"prompt": "body"}},
    "hub": {"hf_hub_url": "o/n", "ms_hub_url": "m/n", "subset": "en", "split": "test[:9]", "folder": "data/x", "num_samples": 5},
    "remote": {"cloud_file_name": "s3://bucket/a.jsonl"},
    "folder": {"file_name": "parts"},
}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat.json": [
        {
            "dialog": [
                {"who": "customer", "said": "Time?"},
                {"who": "call", "said": '{"name": "now", "arguments": {}}'},
                {"who": "result", "said": "12:00"},
                {"who": "agent", "said": "Noon."},
            ],
            "sys": "Be kind.",
            "funcs": '[{"name": "now", "parameters": {}}]',
        }
    ],
    "openai.json": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "plain.json": [{"instruction": "a", "input": "b", "output": "c"}],
    "named.json": [{"q": "a", "more": "b", "a": "c", "before": [["d", "e"]]}],
    "text.json": [{"body": "a"}],
}


@pytest.fixture
def info(tmp_path: Path) -> Path:
    """A folder of LLaMA-Factory; its dataset_info.json."""
    for name, rows in ROWS.items():
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps(ENTRIES))
    return tmp_path / "dataset_info.json"


def data(**keys: Any) -> Data:
    return Data(**{"name": "set", "path": None} | keys)


def only(**keys: Any) -> DataSet:
    (data_set,) = datasets.training(data(**keys)).values()
    return data_set


def turns(data_set: DataSet) -> list[tuple[str, str]]:
    """(role, content) of the first row of a set."""
    assert data_set.format is not None
    row = next(row for block in sources.read_blocks(data_set) for _, row in block.parsed())
    sample = formats.convert(row, data_set.format.name, data_set.fields, data_set.roles)
    return [(turn.role, turn.content) for turn in sample.turns] or [("", text) for text, _ in sample.parts]


EXPECTED = {
    "chat": [("system", "Be kind."), ("user", "Time?"), ("assistant", ""), ("tool", "12:00"), ("assistant", "Noon.")],
    "openai": [("user", "a"), ("assistant", "b")],
    "plain": [("user", "a\nb"), ("assistant", "c")],
    "named": [("user", "d"), ("assistant", "e"), ("user", "a\nb"), ("assistant", "c")],
    "pretraining": [("", "a")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_entry_gives_the_rows_of_llama_factory(name, info: Path) -> None:
    assert turns(only(path=str(info), subset=name)) == EXPECTED[name]
    assert turns(only(path=f"{info}:{name}")) == EXPECTED[name]
    assert turns(only(sets={"a": DataSet(str(info), name)})) == EXPECTED[name]


def test_columns_that_llama_factory_does_not_read_are_ignored(info: Path) -> None:
    assert only(path=str(info), subset="plain").ignore == ["history", "system", "tools"]
    assert only(path=str(info), subset="chat").ignore == []
    assert only(path=str(info), subset="openai").ignore == ["system", "tools"]


def test_sources_other_than_files(info: Path) -> None:
    hub = only(path=str(info), subset="hub")
    assert (hub.path, hub.subset, hub.split, hub.files, hub.num_samples) == ("o/n:test", "en", "[:9]", ["data/x/**"], 5)
    assert only(path=str(info), subset="remote").path == "s3://bucket/a.jsonl"
    assert only(path=str(info), subset="folder").path == str(info.parent / "parts")


def test_what_the_config_says_wins(info: Path) -> None:
    given = only(
        path=str(info),
        subset="chat",
        fields={"system": "x"},
        roles={"agent": "user"},
        split="[:1]",
        format=Format.messages,
    )
    assert (given.fields["system"], given.fields["messages"]) == ("x", "dialog")
    assert (given.roles["agent"], given.roles["customer"]) == ("user", "user")
    assert (given.split, given.format) == ("[:1]", Format.messages)


def test_the_only_entry_needs_no_name(info: Path) -> None:
    info.write_text(json.dumps({"plain": ENTRIES["plain"]}))
    assert turns(only(path=str(info))) == EXPECTED["plain"]


def test_a_missing_file_is_left_to_the_check_for_files(tmp_path: Path) -> None:
    path = str(tmp_path / "dataset_info.json")
    assert only(path=path, subset="a").path == path


@pytest.mark.parametrize("subset", [None, "other"])
def test_the_error_for_a_missing_name_lists_all(subset, info: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*choose one of chat, openai, .*for example data\.subset=chat$"):
        only(path=str(info), subset=subset)
    with pytest.raises(DataError, match=r"data\.sets\.a\.path=.*for example data\.sets\.a\.subset=chat$"):
        only(sets={"a": DataSet(str(info), subset)})
    with pytest.raises(DataError, match=r"data\.validation_path=") as caught:
        datasets.held_out(data(path="x", validation_path=str(info)))
    remedy = str(caught.value).rpartition("data.validation_path=")[2]
    assert datasets.held_out(data(path="x", validation_path=remedy)).path == str(info.parent / "chat.json")  # type: ignore[union-attr]


REFUSED = [
    ({"file_name": "a", "ranking": True}, "ranking marks preference data"),
    ({"file_name": "a", "columns": {"prompt": "a", "chosen": "b"}}, "the column chosen marks preference data"),
    ({"file_name": "a", "columns": {"kto_tag": "b"}}, "the column kto_tag marks preference data"),
    ({"file_name": "a", "columns": {"messages": "a", "images": "b"}}, "the column images is not text"),
    ({"file_name": "a", "columns": {"answers": "b"}}, "the column answers is unknown"),
    ({"file_name": "a", "tags": {"bot_tag": "b"}}, "the tag bot_tag is unknown"),
    ({"file_name": "a", "formatting": "parquet"}, "formatting parquet is unknown: use one of alpaca, sharegpt, openai"),
    ({"file_name": "a", "new_key": 1}, "the key new_key is unknown"),
    ({"file_name": "a", "split": "test"}, "split test is only possible with hf_hub_url"),
    ({"hf_hub_url": "a", "split": "train[1,2]"}, r"split train\[1,2\] is not understood"),
    ({"script_url": "a"}, "script_url is not supported: give file_name or hf_hub_url instead"),
    ({"ms_hub_url": "a"}, "ms_hub_url is not supported"),
    ({"om_hub_url": "a"}, "om_hub_url is not supported"),
]


@pytest.mark.parametrize(("entry", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(entry, message, info: Path) -> None:
    info.write_text(json.dumps({"one": entry}))
    with pytest.raises(DataError, match=rf"data\.path={re.escape(str(info))}:one: {message}"):
        only(path=str(info))


@pytest.mark.parametrize("content", ['{"features": {}, "splits": {}}', "[]", "{", '{"a": {"columns": {}}}'])
def test_another_dataset_info_is_not_taken_for_a_list_of_sets(content, info: Path) -> None:
    info.write_text(content)
    with pytest.raises(DataError, match="is not LLaMA-Factory's list of sets|cannot be read as JSON"):
        only(path=str(info))


@pytest.mark.parametrize(
    ("validation_path", "expected"),
    [
        ("o/n", ("s", "v", ["a/*"])),
        ("o/n:test", ("s", "v", [])),
        ("o/other", (None, None, [])),
        ("held.jsonl", (None, None, [])),
    ],
)
def test_a_subset_holds_for_validation_rows_of_the_same_set(validation_path, expected) -> None:
    keys = {"subset": "s", "revision": "v", "files": ["a/*"]}
    for config in (data(path="o/n", **keys), data(sets={"b": DataSet("x/y"), "a": DataSet("o/n", **keys)})):
        config.validation_path = validation_path
        found = datasets.held_out(config)
        assert found is not None
        assert (found.subset, found.revision, found.files) == expected
