"""Files that are not on this machine: addresses of fsspec and web addresses."""

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.errors import DataError
from conf.schema_model import DataSet
from jobs.data import cache_key, data_files, remote_files, sources

ROWS = [{"text": f"row {number}"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: str, **keys: Any) -> list[Any]:
    return [row for block in sources.read_blocks(DataSet(path, **keys)) for _, row in block.parsed()]


@pytest.fixture
def memory() -> Iterator[Any]:
    """A remote file system, in memory."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/data/train.jsonl.gz", gzip.compress(LINES))
    filesystem.pipe("/data/test.jsonl", b'{"text": "held out"}\n')
    filesystem.pipe("/data/.hidden/a.jsonl", b'{"text": "hidden"}\n')
    yield filesystem
    filesystem.rm("/", recursive=True)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that cannot send parts of files."""
    (tmp_path / "a b.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    remote_files.download.cache_clear()


@pytest.mark.parametrize("path", ["memory://data/train.jsonl.gz", "memory://data", "memory://data/*.jsonl*"])
def test_a_file_a_folder_and_a_pattern_are_read(path, memory) -> None:
    assert read(path) == ROWS


def test_splits_and_files_are_those_of_a_local_folder(memory) -> None:
    assert read("memory://data:test") == read("memory://data", files=["test*"]) == [{"text": "held out"}]
    assert read("memory://data", split="[20%:40%]") == ROWS[1:2]
    (block,) = sources.read_blocks(DataSet("memory://data"))
    assert block.location == "memory:///data/train.jsonl.gz:"
    assert block.read == sources.total_size(DataSet("memory://data"))[0]


def test_the_key_of_a_remote_file_changes_with_it(memory, tmp_path: Path) -> None:
    source = DataSet("memory://data")
    before, state = cache_key._hash_rows(source, tmp_path), cache_key.file_states(source)
    assert (cache_key._hash_rows(source, tmp_path), cache_key.file_states(source)) == (before, state)
    memory.pipe("/data/train.jsonl.gz", gzip.compress(LINES.replace(b"row 1", b"row 7")))
    assert cache_key._hash_rows(source, tmp_path) != before
    assert cache_key.file_states(source) != state


def test_parquet_is_read_from_a_remote_file_system(memory, tmp_path: Path) -> None:
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    memory.pipe("/more/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert read("memory://more") == read(f"file://{tmp_path}/a.parquet") == ROWS


@pytest.mark.parametrize("name", ["a%20b.jsonl?download=1&x=y", "a.jsonl.gz", "a.parquet"])
def test_a_web_address_is_read(name, web, tmp_path: Path) -> None:
    assert read(f"{web}/{name}") == ROWS
    (file,) = data_files.find_files(DataSet(f"{web}/{name}")) or []
    assert file.location == f"{web}/{name}"
    assert len(cache_key._hash_rows(DataSet(f"{web}/{name}"), tmp_path / "cache")[0][2]) == 64


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("WEB/nowhere.jsonl", "cannot be downloaded: HTTP Error 404"),
        ("http://127.0.0.1:1/a.jsonl", "cannot be downloaded: .*refused"),
        ("nowhere://a/b.jsonl", "cannot be opened: Protocol not known: nowhere"),
        ("zip://a.jsonl::/nowhere/a.zip", "cannot be opened: .*No such file"),
        ("https://", "cannot be downloaded"),
        ("memory://data/nowhere.jsonl", "no such file"),
        ("memory://data/nowhere*", "no such file"),
        ("hf://datasets/owner/name/a.jsonl", "no such file. HF_HUB_OFFLINE is set|cannot be read: "),
    ],
)
def test_an_address_that_cannot_be_read_is_named(path, message, web, memory) -> None:
    path = path.replace("WEB", web)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("path", "package", "module"), [("s3://b/a.jsonl", "s3fs", "s3fs"), ("gs://b/a.jsonl", "gcsfs", "gcsfs")]
)
def test_a_missing_package_is_named(path, package, module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)  # as if it were not installed
    fsspec.registry  # noqa: B018
    with pytest.raises(DataError, match=f"a package that reads .* is missing .*: pip install {package}"):
        read(path)
