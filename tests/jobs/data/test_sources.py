"""Every file format gives the same rows with their locations; broken rows and files are named by file and line."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.errors import DataError, Problem
from conf.schema_model import DataSet
from jobs.data import data_files, file_readers, sources

ROWS = [{"instruction": f"Say {n}.", "output": "é\nü" if n == 3 else "x" * n} for n in range(7)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(path, split=None):
    """(location, row) of every row; raises DataError for the first that cannot be read."""
    for block in sources.read_blocks(DataSet(str(path), split=split)):
        for number, row in block.parsed():
            if isinstance(row, file_readers.Unreadable):
                raise DataError(Problem("data.path", f"{block.location}{number}", str(row)))
            yield f"{block.location}{number}", row


def write_parquet(path):
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=2)


def write_arrow(path):
    table = arrow.Table.from_pylist(ROWS)
    with arrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def csv_text(separator):
    rows = "".join(f'{row["instruction"]}{separator}"{row["output"]}"\n' for row in ROWS)
    return f"instruction{separator}output\n{rows}"


def write_csv(path):
    path.write_text(csv_text(","))


def zstd(text):
    return arrow.Codec("zstd").compress(text.encode()).to_pybytes()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_text(LINES)),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
        ("lines.json", lambda path: path.write_text(LINES)),
        ("array.jsonl", lambda path: path.write_text(json.dumps(ROWS))),
        ("bom.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode())),
        ("A.JSONL.GZ", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
        ("two.json", lambda path: path.write_text(json.dumps(ROWS[:3]) + "\n" + json.dumps(ROWS[3:]) + "\n")),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
        ("a.json.bz2", lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode()))),
        ("a.jsonl.xz", lambda path: path.write_bytes(lzma.compress(LINES.encode()))),
        ("pretty.json", lambda path: path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))),
        ("pretty.jsonl", lambda path: path.write_text("".join(json.dumps(row, indent=2) for row in ROWS))),
        (
            "wrapped.json",
            lambda path: path.write_text(json.dumps({"version": "1", "info": {"a": [1]}, "data": ROWS, "n": 7})),
        ),
        ("wrapped.jsonl", lambda path: path.write_text(json.dumps({"rows": ROWS}, indent=4) + "\n\n")),
        ("bom.json", lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"train": ROWS}).encode())),
        ("a.ndjson", lambda path: path.write_text(LINES)),
        ("windows.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstd(LINES))),
        ("two.jsonl.zst", lambda path: path.write_bytes(zstd(LINES[:20]) + zstd(LINES[20:]))),
        ("a.json.zst", lambda path: path.write_bytes(zstd(json.dumps({"data": ROWS})))),
        ("a.csv.zst", lambda path: path.write_bytes(zstd(csv_text(",")))),
        ("semicolons.csv", lambda path: path.write_text(csv_text(";"))),
        ("quoted.csv", lambda path: path.write_text('"instruction";"output"' + csv_text(";").partition("output")[2])),
        ("blank.csv", lambda path: path.write_text("\n" + csv_text(","))),
        ("tabs.csv", lambda path: path.write_text(csv_text("\t"))),
        ("a.tsv", lambda path: path.write_text(csv_text("\t"))),
        ("a.parquet", write_parquet),
        ("a.arrow", write_arrow),
        ("a.csv", write_csv),
    ],
)
def test_every_file_format_gives_the_same_rows(name, write, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert [row for _, row in rows_of(str(tmp_path / name))] == ROWS


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("layout", ["array", "objects", "wrapped"])
def test_json_is_decoded_across_chunks(layout, chunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_readers, "CHUNK", chunk)
    rows = [*ROWS, {"n": 12.5}]
    texts = {
        "array": json.dumps(rows, indent=2),
        "objects": "\n".join(json.dumps(row, indent=2) for row in rows),
        "wrapped": json.dumps({"version": 1, "data": rows, "count": 8}, indent=2),
    }
    (tmp_path / "a.json").write_text(texts[layout])
    assert [row for _, row in rows_of(str(tmp_path / "a.json"))] == rows


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SINGLE_ROWS = [
    {"messages": MESSAGES},
    {"id": 1, "conversations": MESSAGES},
    {"tools": [{"name": "f"}], "messages": MESSAGES},
    {"parts": [{"text": "a"}], "text": "b"},
    {"data": ["a", "b"]},
    {"dialog": MESSAGES},
    {"steps": [{"from": "human", "value": "a"}]},
    {"data": []},
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("row", SINGLE_ROWS, ids=[", ".join(row) for row in SINGLE_ROWS])
def test_a_single_row_with_a_list_is_a_row(row, indent, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(row, indent=indent) + "\n")
    assert [row for _, row in rows_of(str(tmp_path / "a.json"))] == [row]


@pytest.mark.parametrize("pad", [0, sources.BEGIN])
def test_lines_with_a_list_under_an_own_name_are_rows(pad, tmp_path: Path) -> None:
    rows = [{"id": 1, "dialog": MESSAGES, "pad": "x" * pad}, {"id": 2, "dialog": MESSAGES}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in rows_of(str(tmp_path / "a.jsonl"))] == rows


def test_a_long_wrapped_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "x" * 1000}] * 20_000}))
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows_of(str(tmp_path / "a.json"))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**23 + sources.LONG_LINE
    finally:
        tracemalloc.stop()


def test_nan_stays_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": NaN, "b": -Infinity}\n')
    ((_, row),) = rows_of(str(tmp_path / "a.jsonl"))
    assert str(row) == "{'a': nan, 'b': -inf}"


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\x85c"}\n{"text": "d"}\n')
    assert [row["text"] for _, row in rows_of(str(tmp_path / "a.jsonl"))] == ["a\u2028b\x85c", "d"]


def test_row_numbers_are_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + LINES)
    (tmp_path / "b.json").write_text(json.dumps(ROWS[:2], indent=1))
    assert next(rows_of(str(tmp_path / "a.jsonl")))[0].endswith("a.jsonl:2")
    assert [where.rsplit(":", 1)[1] for where, _ in rows_of(str(tmp_path / "b.json"))] == ["2", "6"]


@pytest.mark.parametrize("path", ["", "*.jsonl"])
def test_a_folder_or_a_glob_gives_all_files_in_order(path, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert [row["text"] for _, row in rows_of(str(tmp_path / path))] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', r"a\.jsonl:2.*not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2.*not an object"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": 2', r"a\.json:2.*not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 2}\n', r"a\.json:3.*not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": nope}]', r"a\.json:2.*not valid JSON"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'{"text": "a",\n{"text": "b"}\n', r"a\.json:1.*not valid JSON"),
        (
            "a.json",
            b'{"data": [{"text": "a"}]',
            r"a\.json:1.*not valid JSON: a comma is missing, or the object does not end",
        ),
        ("a.json", b'{"data": [{"text": "a"}]}\n\n[', r"a\.json:3.*not valid JSON"),
        ("a.json", b'[{"a": 1}]\n garbage', r"a\.json:2.*not valid JSON: only another array may follow"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}', r"a\.json:2.*not valid JSON: the array does not end"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', r"a\.json:2.*not valid JSON: a comma is missing"),
        ("a.json", b'[{"a": 1},\n{"a": ' + b"1" * 5000 + b"}]", r"a\.json:2.*not valid JSON: Exceeds the limit"),
        ("a.json", b'[{"a": 1},\n' + b"[" * 200_000, r"a\.json:2.*not valid JSON: nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", r"a\.jsonl:2.*not valid JSON: Exceeds the limit"),
        ("a.jsonl", b'[{"a": 1}]\n[{"a": 2}]\n', r"a\.jsonl:1: is a list, not an object"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2.*columns"),
        ("a.csv", b"a,b\n1\n", r"a\.csv:2.*columns"),
        ("a.csv", b'a,"b\n1,2\n', r"a\.csv:1: is not valid CSV"),
        ("a.csv", b'a,b\n\n"1\n\n",2,3\n', r"a\.csv:3: .*columns"),
        ("a.csv", b'a,b\n1,2\n"1\n2,3\n', r"a\.csv:3: is not valid CSV"),
        ("a.parquet", b"PAR1 no", "damaged"),
        ("a.arrow", b"nothing like it", "damaged"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read"),
        ("a.xlsx", b"", "ends in none of"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(rows_of(str(tmp_path / name)))


def test_a_csv_row_can_be_long_and_is_numbered_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n"1\n2",3\n\n4,' + "5" * 200_000)
    rows = list(rows_of(str(tmp_path / "a.csv")))
    assert [where.rsplit(":", 1)[1] for where, _ in rows] == ["2", "5"]
    assert [row["b"] for _, row in rows] == ["3", "5" * 200_000]


def test_an_early_error_in_an_array_is_raised_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_readers, "CHUNK", 2**10)
    (tmp_path / "a.json").write_text('[{"a": nope},' + '{"a": 1},' * 10_000)
    with (tmp_path / "a.json").open("rb") as opened:
        with pytest.raises(DataError, match="not valid JSON"):
            list(file_readers.json_arrays(opened, str(tmp_path / "a.json")))
        assert opened.tell() < 2**15


def test_a_large_row_group_is_read_in_small_batches(tmp_path: Path) -> None:
    table = arrow.table({"text": [random.Random(row).randbytes(2000).hex() for row in range(4000)]})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none")
    tracemalloc.start()
    try:
        assert (
            next(sources.read_blocks(DataSet(str(tmp_path / "a.parquet")))).rows[0][1]
            == table.slice(0, 1).to_pylist()[0]
        )
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["", "*"])
def test_metadata_and_other_files_are_skipped(path, tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json", "dataset_dict.json", "README.md"):
        (tmp_path / name).write_text('{"text": "no"}')
    with pytest.raises(DataError, match="has no file ending in"):
        data_files.find_files(DataSet(str(tmp_path / path)))
    (tmp_path / "a.JSON").write_text('{"text": "yes"}')
    assert [row["text"] for _, row in rows_of(str(tmp_path / path))] == ["yes"]


def test_a_percentage_counts_unreadable_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nbroken\n{"a": 2}\n{"a": 3}\n')
    rows = [
        item
        for block in sources.read_blocks(DataSet(str(tmp_path / "a.jsonl"), split="[50%:]"))
        for item in block.parsed()
    ]
    assert rows == [(3, {"a": 2}), (4, {"a": 3})]


def test_an_error_of_the_hub_without_a_message_is_named_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", refused)
    with pytest.raises(DataError, match="the Hub answers: ConnectionError"):
        list(rows_of("owner/name"))


@pytest.mark.parametrize(("path", "message"), [("/nowhere/a.jsonl", "no such file"), ("./*.jsonl", "no such file")])
def test_a_missing_file_is_named(path, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        list(rows_of(path))
