"""Hub sets: subset, split, revision and files reach `datasets`. Folders with the Hub's list of subsets stand for the Hub."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from conf.errors import DataError
from conf.schema_model import DataSet
from jobs.data import cache_key, hub, sources

README = """---
configs:
- config_name: one
  data_files:
  - split: train
    path: one/train.jsonl
  - split: test
    path: one/test.jsonl
- config_name: two
  data_files:
  - split: main
    path: two/rows.jsonl
---
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a Hub set with two subsets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    copy = tmp_path / "copy"
    (copy / "one").mkdir(parents=True)
    (copy / "two").mkdir()
    (copy / "README.md").write_text(README)
    (copy / "one/train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (copy / "one/test.jsonl").write_text('{"text": "c"}\n')
    (copy / "two/rows.jsonl").write_text('{"text": "d", "call": {"x": 1}}\n{"text": "e", "call": {"y": 2}}\n')
    return copy


def read(path: object, **keys: Any) -> list[tuple[str, Any]]:
    blocks = sources.read_blocks(DataSet(str(path), **keys))
    return [(f"{block.location}{number}", row) for block in blocks for number, row in block.parsed()]


def test_a_subset_and_its_splits_are_read(folder: Path) -> None:
    assert read(folder, subset="one") == [(f"{folder} row 1", {"text": "a"}), (f"{folder} row 2", {"text": "b"})]
    assert [row for _, row in read(f"{folder}:test", subset="one")] == [{"text": "c"}]
    assert [row for _, row in read(f"{folder}:train[1:]", subset="one")] == [{"text": "b"}]
    assert [row for _, row in read(folder, subset="one", split="[50%:]")] == [{"text": "b"}]
    calls = [row["call"] for _, row in read(f"{folder}:main", subset="two")]
    assert calls == [{"x": 1}, {"y": 2}]
    assert sources.total_size(DataSet(str(folder), "one")) == (2, " rows")


@pytest.mark.parametrize("subset", [None, "three"])
def test_a_missing_subset_is_named_with_all_that_there_are(subset, folder: Path) -> None:
    with pytest.raises(DataError, match=r"has the subsets one, two: choose one, for example data\.subset=one"):
        read(folder, subset=subset)


def test_a_missing_split_is_named_with_all_that_there_are(folder: Path) -> None:
    with pytest.raises(DataError, match="has no split train: choose one of main") as caught:
        read(folder, subset="two")
    assert read(str(caught.value).rpartition("data.path=")[2], subset="two")


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Hub set of which only the copies in the cache of `datasets` can be read; its commit."""
    for constant in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(constant, True)  # as the variable does: nobody waits for a network that is not there
    for path, subset in ((folder, "one"), (f"{folder}:main", "two")):
        read(path, subset=subset)
    (tmp_path / "cache/copy").rename(tmp_path / "cache/owner___copy")
    shutil.rmtree(folder)
    (first, second) = (tmp_path / "cache/owner___copy").glob("*/0.0.0/*/")
    assert first.name == second.name
    return first.name


def test_a_hub_set_is_read_from_the_cache_without_network(cached: str) -> None:
    assert read("owner/copy", subset="one") == [
        ("owner/copy row 1", {"text": "a"}),
        ("owner/copy row 2", {"text": "b"}),
    ]
    assert [row["call"] for _, row in read("owner/copy:main", subset="two")] == [{"x": 1}, {"y": 2}]
    assert read("owner/copy:test", subset="one", revision=cached) == [("owner/copy:test row 1", {"text": "c"})]
    with pytest.raises(DataError, match=r"has the subsets one, two: choose one, for example data\.subset=one"):
        read("owner/copy")
    with pytest.raises(DataError, match="Couldn't find cache for owner/copy for config 'three'"):
        read("owner/copy", subset="three")


def test_another_revision_than_the_copy_in_the_cache_is_refused(cached: str) -> None:
    with pytest.raises(DataError, match=r"data\.revision=v1: the Hub cannot be asked") as caught:
        read("owner/copy", subset="one", revision="v1")
    assert read("owner/copy", subset="one", revision=str(caught.value).rpartition("data.revision=")[2])


def test_the_subset_and_the_revision_decide_the_cache_key(folder: Path, tmp_path: Path) -> None:
    hashes = [
        cache_key._hash_rows(DataSet(path, subset), tmp_path)
        for path, subset in ((str(folder), "one"), (f"{folder}:test", "one"), (f"{folder}:main", "two"))
    ]
    assert hashes[0] == cache_key._hash_rows(DataSet(str(folder), "one"), tmp_path)
    assert len({str(item) for item in hashes}) == 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (DataSet("o/n"), ("o/n", None, None, "train", None)),
        (DataSet("o/n:test[:9]", "s", "v1"), ("o/n", "s", None, "test[:9]", "v1")),
        (DataSet("o/n", files=["a/*"]), ("o/n", None, {"train": ["a/*"]}, "train", None)),
        (DataSet("o/n:test[:9]", files=["a/*"]), ("o/n", None, {"test": ["a/*"]}, "test[:9]", None)),
    ],
)
def test_datasets_is_asked_for_what_the_config_says(source, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, data_files: object, split: str, revision: str | None) -> str:
        asked.append((name, subset, data_files, split, revision))
        return "a set"

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: None)
    assert hub.load(source) == "a set"
    assert asked == [expected]


def test_a_set_that_breaks_off_is_named_with_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: datasets.Dataset, size: int) -> Any:
        yield self[:1]
        raise OSError("\n")

    monkeypatch.setattr("datasets.Dataset.iter", broken)
    with pytest.raises(DataError, match="cannot be read after row 1: OSError"):
        read(folder, subset="one")
