"""Which files of a folder, a pattern or a saved set are read: those for training, each once, and never a copy in a cache."""

import json
import logging
import re
import shlex
from pathlib import Path

import datasets
import pytest

from conf.errors import DataError
from conf.schema_model import DataSet
from jobs.data import sources, split_names
from jobs.distributed.log_once import log_once


@pytest.fixture(autouse=True)
def _say_again() -> None:
    log_once.cache_clear()


def fill(folder: Path, *names: str) -> Path:
    """Files whose only row says which file it is."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def names_read(path: object, **keys: object) -> list[str]:
    blocks = sources.read_blocks(DataSet(str(path), **keys))  # type: ignore[arg-type]
    return [row["text"] for block in blocks for _, row in block.parsed()]


SPLITS = [
    (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
    (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"],
     ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
    (["data/train/a.jsonl", "data/test/a.jsonl", "data/dev/a.jsonl"], ["data/train/a.jsonl"]),
    (["my_train_v2.jsonl", "my_valid_v2.jsonl"], ["my_train_v2.jsonl"]),
    (["TrainSet.jsonl", "TestSet.jsonl"], ["TrainSet.jsonl"]),
    (["trainset.jsonl", "valset.jsonl"], ["trainset.jsonl"]),
    (["train.jsonl", "eval.jsonl", "extra.jsonl"], ["train.jsonl"]),
    (["a.jsonl", "held_out.jsonl"], ["a.jsonl"]),
    (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    (["a.jsonl", "train.jsonl"], ["a.jsonl", "train.jsonl"]),
    (["a.jsonl", "test.jsonl"], ["a.jsonl"]),
    (["test-0.jsonl", "test-1.jsonl"], ["test-0.jsonl", "test-1.jsonl"]),
    (["contest.jsonl", "latest.jsonl", "trainer.jsonl"], ["contest.jsonl", "latest.jsonl", "trainer.jsonl"]),
    (["test/train.jsonl", "test/validation.jsonl"], ["test/train.jsonl"]),
    (["train_test.jsonl"], ["train_test.jsonl"]),
    (["LICENSE.txt", "a.jsonl", "more/requirements.txt"], ["a.jsonl"]),
    (["test.jsonl", "train.jsonl", "notes.txt"], ["train.jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
@pytest.mark.parametrize(("files", "expected"), SPLITS, ids=[" ".join(files) for files, _ in SPLITS])
def test_the_files_for_training_are_read(files, expected, pattern, tmp_path: Path) -> None:
    assert names_read(fill(tmp_path, *files) / pattern) == expected


@pytest.mark.parametrize("name", ["test.jsonl", "train_test.jsonl", ".hidden.jsonl"])
def test_a_file_given_by_name_is_read_whatever_it_is_called(name, tmp_path: Path) -> None:
    assert names_read(fill(tmp_path, name, "train.jsonl") / name) == [name]


def test_texts_alone_are_rows_and_texts_beside_rows_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = fill(tmp_path / "texts", "LICENSE.txt", "book.txt")
    assert len(names_read(folder)) == 2
    fill(folder, "a.jsonl")
    assert names_read(folder) == ["a.jsonl"]
    assert "leaves out LICENSE.txt, book.txt, because other files hold rows" in caplog.text
    assert len(names_read(folder, files=["LICENSE.txt"])) == 1


def test_a_folder_inside_a_folder_called_test_is_not_for_testing(tmp_path: Path) -> None:
    assert names_read(fill(tmp_path / "test", "a.jsonl", "b.jsonl")) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("path", ["", "*.jsonl"])
def test_the_log_says_what_is_left_out_and_how_to_read_it(
    path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names_read(fill(tmp_path, "train.jsonl", "test[1].jsonl") / path)
    (message,) = [record.message for record in caplog.records if "leaves out" in record.message]
    assert "reads train.jsonl; leaves out test[1].jsonl" in message
    folder, files = shlex.split(message.rpartition("to read them: ")[2].removesuffix(")"))
    assert names_read(folder.removeprefix("data.path="), files=json.loads(files.removeprefix("data.files="))) == [
        "test[1].jsonl"
    ]


@pytest.mark.parametrize("files", [["test.jsonl", "dev.jsonl"], ["train_test.jsonl", "other.jsonl"]])
def test_names_that_say_nothing_clear_are_refused_with_a_way_out(files, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Name one file") as caught:
        names_read(fill(tmp_path, *files))
    one, several = str(caught.value).rpartition("Name one file, data.path=")[2].split(", or several, ")
    assert len(names_read(one)) == 1
    folder, chosen = shlex.split(several)
    assert names_read(folder.removeprefix("data.path="), files=json.loads(chosen.removeprefix("data.files=")))


@pytest.mark.parametrize(("split", "expected"), [("test", "test.jsonl"), ("dev", "val.jsonl"), ("odd", "odd/a.jsonl")])
def test_a_split_of_a_folder_can_be_named(split, expected, tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "test.jsonl", "val.jsonl", "odd/a.jsonl")
    assert names_read(f"{tmp_path}:{split}") == [expected]


def test_a_split_that_a_folder_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no name has a word for test"):
        names_read(f"{fill(tmp_path, 'train.jsonl')}:test")
    with pytest.raises(DataError, match=re.escape("data.split='[:9]'")):
        names_read(f"{tmp_path}:train[:9]")
    assert names_read(f"{tmp_path}:train", split="[:9]") == ["train.jsonl"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["test*"], ["test.jsonl"]),
        (["test.jsonl", "train.jsonl"], ["test.jsonl", "train.jsonl"]),
        (["**/*.jsonl"], ["more/a.jsonl", "test.jsonl", "train.jsonl"]),
        (["more", "more/*"], ["more/a.jsonl"]),
    ],
)
def test_the_files_of_a_folder_can_be_named(patterns, expected, tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "test.jsonl", "more/a.jsonl")
    assert names_read(tmp_path, files=patterns) == expected


@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [
        ("", {"files": ["x*"]}, r"data\.files=x\*: matches no file of .*, which has test\.jsonl, train\.jsonl"),
        ("", {"files": ["../x"]}, r"data\.files=\.\./x: must name files inside .* begin it with neither"),
        ("train.jsonl", {"files": ["x"]}, r"data\.files=x: applies to Hub sets and folders only"),
        ("*.jsonl", {"files": ["x"]}, r"data\.files=x: applies to .* is a pattern"),
        ("train.jsonl", {"subset": "x"}, r"data\.subset=x: applies to Hub sets, .* is a file: remove it"),
        ("", {"subset": "x"}, r"data\.subset=x: .* lists no subsets: remove it"),
        ("", {"revision": "x"}, r"data\.revision=x: applies to Hub sets only"),
    ],
)
def test_keys_that_do_not_apply_are_refused(path, keys, message, tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(DataError, match=message):
        names_read(tmp_path / path, **keys)


@pytest.mark.parametrize("pattern", ["", "**/*"])
def test_copies_in_hidden_folders_are_skipped(pattern, tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", ".b.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", ".git/x/a.jsonl")
    assert names_read(tmp_path / pattern) == ["a.jsonl"]


def saved(folder: Path, **splits: list[str]) -> Path:
    """A DatasetDict that `save_to_disk` wrote."""
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(str(folder))
    return folder


def test_a_saved_set_is_read_without_the_caches_of_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.save_to_disk(str(tmp_path / "set"))
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    loaded.map(lambda row: {"text": row["text"].upper()})
    loaded.shuffle(seed=1)
    assert list(tmp_path.glob("set/cache-*.arrow")), "datasets wrote no cache"
    assert names_read(tmp_path / "set") == ["a", "b", "c"]
    assert names_read(f"{tmp_path}/set/*.arrow") == ["a", "b", "c"]


def test_a_shuffled_set_is_saved_in_its_new_order(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": list("abcdef")}).shuffle(seed=3)
    rows.save_to_disk(str(tmp_path / "set"))
    assert names_read(tmp_path / "set") == rows["text"][:]


def test_only_the_train_split_of_a_saved_set_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = saved(tmp_path / "set", train=["a", "b"], test=["c"], odd=["d"])
    assert names_read(folder) == ["a", "b"]
    remedy = caplog.messages[-1].rpartition("to read one of them: data.path=")[2].removesuffix(")")
    assert names_read(remedy) == ["c"]
    assert names_read(f"{folder}:odd") == names_read(folder / "odd") == ["d"]


def test_a_saved_set_without_train_needs_a_choice(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", train_sft=["a"], test_sft=["b"])
    with pytest.raises(DataError, match="has the splits train_sft, test_sft: choose one") as caught:
        names_read(folder)
    assert names_read(str(caught.value).rpartition("data.path=")[2]) == ["a"]
    assert names_read(saved(tmp_path / "one", only=["x"])) == ["x"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}, "flatten_indices"),
        ({"a": 1}, r"state\.json: is not the state\.json of save_to_disk"),
    ],
)
def test_a_saved_set_that_cannot_be_read_as_it_is_is_refused(state, message, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set/state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=message):
        names_read(tmp_path / "set")


def test_a_folder_of_llama_factory_names_its_notation(tmp_path: Path) -> None:
    fill(tmp_path, "a.json", "b.json")
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "a.json"}, "b": {"file_name": "b.json"}}')
    for keys in ({}, {"subset": "a"}):
        with pytest.raises(DataError, match=r"Choose one: data\.path=.*/dataset_info\.json data\.subset=a"):
            names_read(tmp_path, **keys)


def test_words_are_taken_from_the_nearest_part_of_a_name() -> None:
    assert split_names.split_of("train/held-out/a.jsonl") == "validation"
    assert split_names.split_of("attestation.jsonl") is None
    with pytest.raises(split_names.UnclearSplit):
        split_names.split_of("train/test_train.jsonl")
