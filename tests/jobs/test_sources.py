"""Every kind of file gives the same rows with the place of each; what is broken is named by file and line."""

import bz2
import gzip
import json
import lzma

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.errors import DataError
from jobs import sources

ROWS = [{"instruction": f"Say {n}.", "output": "é\nü" if n == 3 else "x" * n} for n in range(7)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_parquet(path):
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=2)


def write_arrow(path):
    table = arrow.Table.from_pylist(ROWS)
    with arrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_csv(path):
    path.write_text("instruction,output\n" + "".join(f'{row["instruction"]},"{row["output"]}"\n' for row in ROWS))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_text(LINES)),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
        ("lines.json", lambda path: path.write_text(LINES)),
        ("array.jsonl", lambda path: path.write_text(json.dumps(ROWS))),
        ("bom.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode())),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
        ("a.json.bz2", lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode()))),
        ("a.jsonl.xz", lambda path: path.write_bytes(lzma.compress(LINES.encode()))),
        ("a.parquet", write_parquet),
        ("a.arrow", write_arrow),
        ("a.csv", write_csv),
    ],
)
def test_every_kind_of_file_gives_the_rows(name, write, tmp_path):
    write(tmp_path / name)
    assert [row for _, row in sources.rows(str(tmp_path / name))] == ROWS


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_is_decoded_across_chunks(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(json.dumps([*ROWS, {"n": 12.5}], indent=2))
    assert [row for _, row in sources.rows(str(tmp_path / "a.json"))] == [*ROWS, {"n": 12.5}]


def test_places_are_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + LINES)
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:2], indent=1))
    assert next(sources.rows(str(tmp_path / "a.jsonl")))[0].endswith("a.jsonl:2")
    assert [where.rsplit(":", 1)[1] for where, _ in sources.rows(str(tmp_path / "b.json"))] == ["2", "6"]


@pytest.mark.parametrize("path", ["", "*.jsonl"])
def test_a_folder_or_a_glob_is_all_its_files_in_order(path, tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert [row["text"] for _, row in sources.rows(str(tmp_path / path))] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', r"a\.jsonl:2.*not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2.*not an object"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": 2', r"a\.json:2.*not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 2}\n', r"a\.json:3.*not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": nope}]', r"a\.json:2.*not valid JSON"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2.*columns"),
        ("a.csv", b"a,b\n1\n", r"a\.csv:2.*columns"),
        ("a.parquet", b"PAR1 no", "damaged"),
        ("a.arrow", b"nothing like it", "damaged"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cannot be read"),
        ("a.xlsx", b"", "ends in none of"),
    ],
)
def test_broken_files_are_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(sources.rows(str(tmp_path / name)))


@pytest.mark.parametrize(("path", "said"), [("/nowhere/a.jsonl", "no such file"), ("./*.jsonl", "no such file")])
def test_what_is_not_there_is_named(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said):
        list(sources.rows(path))
