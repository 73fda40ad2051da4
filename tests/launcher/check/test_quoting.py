"""Names and values with any letters can be given on the command line, and every quoting that a message names works."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import launch
from conf.resolve import dump, load, resolve
from conf.schema_model import Data
from launcher.check import command_line, quoting
from tests.conftest import ROOT, Launch


def data_of(*words: str) -> Data:
    """`data` of the config for these words, set as Hydra sets them. Composing the whole config takes a second."""
    kept, entries = quoting.read_words(list(words))
    assert command_line.problems(kept, ROOT / "conf") == []
    config = OmegaConf.create({"data": OmegaConf.structured(Data(name="set", path=None))})
    for override in OverridesParser.create().parse_overrides(kept):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    quoting.apply(config, entries)
    data = OmegaConf.to_object(config.data)
    assert isinstance(data, Data)
    return data


PATHS = [
    "日本.jsonl", "é.jsonl", "a b.jsonl", "a=b.jsonl", "a(1).jsonl", "a[1].jsonl", "it's.jsonl", 'say "hi".jsonl', "~/a.jsonl",
    "a#b;c!d.jsonl", "{a}.jsonl", "https://host/a?x=1&y=(2)", "o/n:train[:100]", "a\\ü", "a\\\"ü", "ü\\",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_read_as_it_is_written(path) -> None:
    assert data_of(f"data.path={path}").path == path
    typed = quoting.quoted("data.path", path)
    assert typed is not None
    assert data_of(*shlex.split(typed)).path == path


ENTRIES: list[tuple[list[str], str, Any]] = [
    (["data.roles={用户: user, 助手: assistant}"], "roles", {"用户": "user", "助手": "assistant"}),
    (['data.roles={"用户": user, "助手": "assistant"}'], "roles", {"用户": "user", "助手": "assistant"}),
    (["data.roles={'用户':user}"], "roles", {"用户": "user"}),
    (["data.roles={John Smith: user}"], "roles", {"John Smith": "user"}),
    (['data.roles={"a, b: c": user, d(1): assistant}'], "roles", {"a, b: c": "user", "d(1)": "assistant"}),
    (["data.roles={a=b: user}"], "roles", {"a=b": "user"}),
    (["data.roles={gpt-4.1: assistant}"], "roles", {"gpt-4.1": "assistant"}),
    (["data.roles.gpt-4.1=assistant"], "roles", {"gpt-4.1": "assistant"}),
    (["data.roles.用户=user", "data.roles.助手=assistant"], "roles", {"用户": "user", "助手": "assistant"}),
    (["+data.roles.John Smith=user"], "roles", {"John Smith": "user"}),
    (["data.roles={prof: assistant}"], "roles", {"prof": "assistant"}),
    (['data.fields.output="my col"'], "fields", {"output": "my col"}),
    (["data.fields.output=my col (1), b"], "fields", {"output": "my col (1), b"}),
    (["data.fields.output=答案"], "fields", {"output": "答案"}),
    (["data.fields={output: 答案, instruction: my col}"], "fields", {"output": "答案", "instruction": "my col"}),
    (["data.fields.output={{ row['é'] == 1 }}"], "fields", {"output": "{{ row['é'] == 1 }}"}),
    (['data.fields={output: "{{ a }} ({{ 答 }})"}'], "fields", {"output": "{{ a }} ({{ 答 }})"}),
    (["data.fields.output=data.answer"], "fields", {"output": "data.answer"}),
    (["data.files=[训练*.jsonl, b (1).jsonl]"], "files", ["训练*.jsonl", "b (1).jsonl"]),
    (['data.files=["test*","b"]'], "files", ["test*", "b"]),
    (["data.split=[:90%]"], "split", "[:90%]"),
    (["data.split=[-100:]"], "split", "[-100:]"),
    (["data.template_kwargs={日期: 1 May, n: 3}"], "template_kwargs", {"日期": "1 May", "n": 3}),
    (["data.template_kwargs={n: 3, b: true}"], "template_kwargs", {"n": 3, "b": True}),
]


@pytest.mark.parametrize(("words", "key", "expected"), ENTRIES, ids=[" ".join(words) for words, _, _ in ENTRIES])
def test_names_and_values_with_any_letters_are_read(words, key, expected) -> None:
    assert getattr(data_of(*words), key) == expected


def test_named_sets_may_have_any_letters(tmp_path: Path) -> None:
    words = ["run_dir=/tmp/x", "data=mix", "data.sets.日本.path=é.jsonl", "data.sets.日本.roles.用户=user"]
    words += [
        "data.sets.my-set.path=a=b.jsonl",
        "data.sets.my-set.files=[é]",
        "data.sets.my-set.roles={助手: assistant}",
    ]
    kept, entries = quoting.read_words(words)
    assert command_line.problems(kept, ROOT / "conf") == []
    (composed,) = launch.compose(command_line.allow_new_entries(kept))
    quoting.apply(composed, entries)
    (tmp_path / "config.yaml").write_text(dump(resolve(composed)), encoding="utf-8")
    sets = load(tmp_path / "config.yaml").data.sets
    assert (sets["日本"].path, sets["日本"].roles) == ("é.jsonl", {"用户": "user"})
    assert (sets["my-set"].path, sets["my-set"].files, sets["my-set"].roles) == (
        "a=b.jsonl",
        ["é"],
        {"助手": "assistant"},
    )


@pytest.mark.parametrize("word", ["data.path=a,b.jsonl", 'data.path="a b.jsonl', 'data.path="a" ü.jsonl'])
def test_the_quoting_that_a_message_names_works(word) -> None:
    kept, entries = quoting.read_words([word])
    assert entries == []
    (problem,) = command_line.problems(kept, ROOT / "conf")
    typed = re.search(r"'data\.path=.*'$", str(problem))
    assert typed, problem
    assert data_of(*shlex.split(typed[0])).path == word.partition("=")[2].strip('"')


@pytest.mark.parametrize("word", ["data.roles={用户: user", "data.roles={用户: {a: b}}", "data.roles=用户"])
def test_what_is_no_dictionary_is_refused(word) -> None:
    kept, entries = quoting.read_words([word])
    assert entries == []
    (problem,) = command_line.problems(kept, ROOT / "conf")
    assert "is not a dictionary. Write it in quotes for the shell, 'data.roles={name: value}'" in str(problem)


@pytest.mark.parametrize(
    "word", ["model=llama8b", "train.lr=1e-4", "data.path=${oc.env:HOME}/a", "~data", "-m", "train.lr=1,2"]
)
def test_other_words_are_not_touched(word) -> None:
    assert quoting.read_words([word]) == ([word], [])


def test_entries_are_set_in_every_composed_config() -> None:
    config = OmegaConf.create({"data": {"roles": None}})
    OmegaConf.set_struct(config, True)
    quoting.apply(config, [(("data", "roles", "a.b"), "user"), (("data", "sets", "ü", "path"), "x")])
    assert OmegaConf.to_container(config) == {"data": {"roles": {"a.b": "user"}, "sets": {"ü": {"path": "x"}}}}


def test_a_launch_takes_such_words_and_shows_the_path(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "é (1), a=b.jsonl"
    path.write_text('{"conversations": [{"from": "用户", "value": "a"}, {"from": "助手", "value": "b"}]}\n')
    typed = quoting.quoted("data.path", str(path))
    assert typed is not None
    words = ["data=jsonl", "data.roles={用户: user, 助手: assistant}", "dry_run=true", "pipeline=preprocess"]
    done = launch(*words, *shlex.split(typed))
    assert done.returncode == 0, done.stderr
    assert f"data      {path}" in done.stdout


@pytest.mark.parametrize(
    "path", ["s3://bucket/a.jsonl", "https://host/a.jsonl?download=true", "hf://datasets/o/n/a.parquet"]
)
def test_a_launch_leaves_remote_files_to_the_job(path, launch: Launch) -> None:
    done = launch("data=jsonl", f"data.path={path}", "dry_run=true", "pipeline=preprocess")
    assert done.returncode == 0, done.stderr
    assert f"data      {path}" in done.stdout
