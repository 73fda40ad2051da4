"""Broken inputs: each gives one error with file, line and remedy. There is no traceback, and no data is written."""

import bz2
import gzip
import json
import lzma
import random
import re
import shutil
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from conf.errors import UserError
from jobs import preprocess
from jobs.data import file_readers, sources
from tests.jobs.ranks import CLONE

GOOD = {"instruction": "Say hi.", "output": "Hi."}
CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]
NOISE = random.Random(0).randbytes(3000)
TOKENISED = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def third(row: object) -> bytes:
    """Two good rows, then this one."""
    like = {"alpaca": GOOD, "chat": {"messages": CHAT}, "tokenised": TOKENISED}
    return lines(*[like["chat" if "messages" in row else "tokenised" if "input_ids" in row else "alpaca"]] * 2, row)


def table(**columns: list) -> bytes:
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    return arrow.Codec("zstd").compress(content).to_pybytes()


def stream() -> bytes:
    sink, rows = arrow.BufferOutputStream(), arrow.table({"text": ["a long enough text"] * 100})
    with arrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


FILES = [
    ("truncated line", "a.jsonl", lines(GOOD) + b'{"instruction": "a', r"a\.jsonl:2: is not valid JSON"),
    ("truncated after a BOM", "a.jsonl", b"\xef\xbb\xbf" + lines(GOOD) + b"{", r"a\.jsonl:2: is not valid JSON"),
    ("truncated array", "a.json", json.dumps([GOOD] * 3, indent=1).encode()[:-9], r"a\.json:\d+.*not valid JSON"),
    ("array not closed", "a.json", json.dumps([GOOD]).encode()[:-1], r"a\.json:1.*the array does not end"),
    ("array broken inside", "a.json", b'[{"text": "a"},\n{"text": ]', r"a\.json:2.*not valid JSON"),
    ("array of numbers", "a.json", b"[1, 2]", r"a\.json:1: is not an object"),
    ("array of arrays", "a.json", b'[["a", "b"]]', r"a\.json:1: is a list, not an object"),
    ("lines of lists", "a.jsonl", b'["a", "b"]\n["c", "d"]\n', r"a\.jsonl:1: is a list, not an object"),
    ("garbage behind an array", "a.json", json.dumps([GOOD]).encode() + b"\n}", r"a\.json:2: is not valid JSON"),
    ("number of 5000 digits", "a.jsonl", lines(GOOD) + b'{"a": ' + b"1" * 5000 + b"}\n", r"a\.jsonl:2: is not valid JSON"),
    ("lines of strings", "a.jsonl", b'"a"\n"b"\n', r"a\.jsonl:1: is not an object"),
    ("half an object over many lines", "a.json", json.dumps(GOOD, indent=2).encode()[:-4], r"a\.json:\d: is not valid JSON"),
    ("object behind a broken one", "a.json", b'{\n"text": "a"\n}\n[', r"a\.json:4: is not valid JSON: text that is no object"),
    ("two lists of rows", "a.json", b'{"one": [{"text": "a"}], "two": [{"text": "b"}]}', r"a\.json:1: one and two both hold lists"),
    ("key twice", "a.jsonl", lines(GOOD) + b'{"instruction": "a", "output": 1, "output": 2}\n', r"a\.jsonl:2: .*'output' twice"),
    ("key of a message twice", "a.jsonl", b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n', "'content' twice"),
    ("key twice in an array", "a.json", b'[{"text": "a"},\n{"text": "b", "text": "c"}]', r"a\.json:2: .*'text' twice"),
    ("CSV column twice", "a.csv", b"instruction,output,output\na,b,c\n", "column 'output' twice"),
    ("random bytes as zstd", "a.jsonl.zst", NOISE, r"a\.jsonl\.zst: cannot be read"),
    ("truncated zstd", "a.jsonl.zst", zstd(lines(*[GOOD] * 90))[:-9], r"a\.jsonl\.zst: cannot be read"),
    ("Parquet of bytes", "a.parquet", table(instruction=["a"], output=[b"b"]), "output is bytes, not text"),
    ("nested without end", "a.jsonl", lines(GOOD) + b'{"a":' * 20000, r"a\.jsonl:2: is not valid JSON"),
    ("empty file", "a.jsonl", b"", "has no rows"),
    ("blank lines", "a.jsonl", b"\n \n\n", "has no rows"),
    ("empty array", "a.json", b"[]", "has no rows"),
    ("latin-1 line", "a.jsonl", lines(GOOD) + b'{"instruction": "\xe9", "output": "b"}\n', r"a\.jsonl:2: is not UTF-8.*iconv"),
    ("latin-1 array", "a.json", b'[{"instruction": "\xe9", "output": "b"}]', r"a\.json: is not UTF-8.*iconv"),
    ("latin-1 text", "a.txt", b"good\ncaf\xe9\n", r"a\.txt:2: is not UTF-8.*iconv"),
    ("latin-1 CSV", "a.csv", b"instruction,output\nb,\xe9\n", r"a\.csv: is not UTF-8.*iconv"),
    ("UTF-16", "a.jsonl", lines(GOOD).decode().encode("utf-16"), r"a\.jsonl: is UTF-16.*iconv"),
    ("UTF-16 without a mark", "a.jsonl", lines(GOOD).decode().encode("utf-16-le"), r"a\.jsonl:1: is not"),
    ("random bytes as lines", "a.jsonl", NOISE, r"a\.jsonl:\d+: is not"),
    ("random bytes as an array", "a.json", b"[" + NOISE, r"a\.json.*is not"),
    ("random bytes as Parquet", "a.parquet", NOISE, r"a\.parquet: is damaged"),
    ("random bytes as Arrow", "a.arrow", NOISE, r"a\.arrow: is damaged"),
    ("random bytes as gzip", "a.jsonl.gz", NOISE, r"a\.jsonl\.gz: cannot be read"),
    ("random bytes as bzip2", "a.jsonl.bz2", NOISE, r"a\.jsonl\.bz2: cannot be read"),
    ("random bytes as xz", "a.jsonl.xz", NOISE, r"a\.jsonl\.xz: cannot be read"),
    ("truncated gzip", "a.jsonl.gz", gzip.compress(lines(*[GOOD] * 90))[:-9], r"a\.jsonl\.gz: cannot be read"),
    ("truncated bzip2", "a.jsonl.bz2", bz2.compress(lines(*[GOOD] * 90))[:-9], r"a\.jsonl\.bz2: cannot be read"),
    ("truncated xz", "a.json.xz", lzma.compress(json.dumps([GOOD] * 90).encode())[:-9], r"a\.json\.xz: cannot be read"),
    ("truncated Parquet", "a.parquet", table(text=["a"] * 9)[:-30], r"a\.parquet: is damaged"),
    ("truncated Arrow", "a.arrow", stream()[:-700], r"a\.arrow: is damaged"),
    ("Parquet of numbers", "a.parquet", table(x=[1, 2], y=[3, 4]), "no known format has the columns x, y"),
    ("CSV of uneven rows", "a.csv", b"instruction,output\na,b\na,b,c\n", r"a\.csv:3: has 3 columns, but the header has 2"),
    ("CSV with an open quote", "a.csv", b'instruction,output\na,"b\n', r"a\.csv:\d: is not valid CSV"),
    ("CSV without rows", "a.csv", b"instruction,output\n", "has no rows"),
    ("unknown ending", "a.xml", b"<a/>", r"a\.xml: ends in none of \.jsonl"),
]  # fmt: skip

ROWS = [
    ("unknown columns", {"a": "b", "c": "d"}, [], "alpaca needs a column instruction"),
    ("other schema", {"text": "a"}, [], r"a\.jsonl:3: alpaca needs a column .*all rows of a file must have one format"),
    ("null answer", {"instruction": "a", "output": None}, [], r"a\.jsonl:3: output is null"),
    ("null question", {"instruction": None, "output": "b"}, [], r"a\.jsonl:3: instruction is null"),
    ("empty answer", {"instruction": "a", "output": "  "}, [], r"gates\.empty=0.*\n.*a\.jsonl:3: output is empty"),
    ("empty question", {"instruction": "", "input": "", "output": "b"}, [], r"a\.jsonl:3: .* both empty"),
    ("odd history", {**GOOD, "history": [["a"]]}, [], r"a\.jsonl:3: history\[0\] is not a pair"),
    ("lone surrogate", {"instruction": "a", "output": "\ud83d"}, [], r"a\.jsonl:3: output holds half a character"),
    ("token id that is not an integer", {"input_ids": [5, 6.5]}, [], r"a\.jsonl:3: input_ids\[1\] is 6\.5, not a token id"),
    ("preferences", {**GOOD, "chosen": "a", "rejected": "b"}, [], r"a\.jsonl:3: .*marks preference data"),
    ("pictures", {**GOOD, "images": ["a.png"]}, [], r"a\.jsonl:3: the column images is not text"),
    ("no turns", {"messages": []}, [], r"a\.jsonl:3: messages is empty"),
    ("turns are a text", {"messages": "a"}, [], r"a\.jsonl:3: messages is not a list"),
    ("null turns", {"messages": None}, [], r"a\.jsonl:3: messages is null"),
    ("unknown role", {"messages": [{"role": "wizard", "content": "a"}, *CHAT]}, [], r"gates\.roles=0.*\n.*'wizard'"),
    ("no assistant", {"messages": CHAT[:1]}, [], r"a\.jsonl:3: no turn is the assistant's"),
    ("turn without content", {"messages": [CHAT[0], {"role": "assistant"}]}, [], r"a\.jsonl:3: messages\[1\]\.content is null"),
    ("turn is a text", {"messages": ["a", "b"]}, [], r"a\.jsonl:3: messages\[0\] is 'a', not an object"),
    ("broken call", {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     [], r"a\.jsonl:3: .*arguments is not valid JSON"),
    ("labels of another length", {"input_ids": [1, 2], "labels": [1]}, [], r"a\.jsonl:3: input_ids has 2 tokens, labels 1"),
    ("shifted labels", {"input_ids": [1, 2], "labels": [2, -100]}, [], r"a\.jsonl:3: a label is 2 where the token is 1"),
    ("no tokens", {"input_ids": []}, [], r"a\.jsonl:3: input_ids is empty"),
    ("token outside the vocabulary", {"input_ids": [5, 999999]}, [], r"gates\.vocabulary=0.*\n.*a\.jsonl:3: token id 999999"),
    ("overlong", {"instruction": "a", "output": "b " * 500}, ["data.overlong=error"], r"a\.jsonl:3: \d+ tokens are over"),
    ("many overlong", {"instruction": "a", "output": "b " * 500}, [], r"gates\.overlong=0\.2.*longer than data\.max_length"),
    ("placeholder", {"instruction": "a", "output": "Dear {{ name }},"}, [], r"gates\.placeholders.*\n.*a\.jsonl:3: {{ name }}"),
    ("duplicates", GOOD, [], r"data\.gates\.duplicates=0\.2"),
    ("field of no column", GOOD, ["data.format=alpaca", "+data.fields={instruction: q, output: output}"], "no column q"),
    ("field with a broken template", GOOD, ["data.format=alpaca", '+data.fields={instruction: "{{ q }}", output: output}'],
     "no column q for data.fields.instruction in any of the first 3 rows"),
    ("part without rows", GOOD, ["data.split='[50:]'"], r"has no rows in \[50:\]"),
    ("part of no such form", GOOD, ["data.split=first"], "is not a part of rows"),
    ("no such template", GOOD, ["data.chat_template=nowhere.jinja"], "not a readable file and not one of chatml"),
    ("template of another model", GOOD, ["data.chat_template=llama3"], "which the tokenizer does not have"),
    ("no such tokenizer", GOOD, ["model.tokenizer=./nowhere"], "model.tokenizer=./nowhere: cannot be loaded"),
]  # fmt: skip


@pytest.fixture
def refused(compose, tmp_path: Path):
    """Preprocess a file with overrides; it must be refused. Returns the message."""

    def message_of(name: str, content: bytes, *overrides: str) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            preprocess.run(compose(f"run_dir={tmp_path}/run", f"data.path={tmp_path / name}", *overrides))
        assert caught.value.exit_code == 2
        assert "Traceback" not in str(caught.value)
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.glob(".data/.*.*-*")), "an unfinished build was left behind"
        return str(caught.value)

    return message_of


@pytest.mark.parametrize(("name", "content", "expected"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_broken_file_is_named(name, content, expected, refused) -> None:
    assert re.search(expected, refused(name, content)), refused(name, content)


@pytest.mark.parametrize(("row", "overrides", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_broken_row_is_named_with_its_line(row, overrides, expected, refused) -> None:
    message = refused("a.jsonl", third(row), *overrides)
    assert re.search(expected, message), message


def test_a_row_without_an_end_does_not_fill_memory(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ROW_LENGTH", 2**16)
    for module in (file_readers, sources):
        monkeypatch.setattr(module, "MAX_ROW_LENGTH", 2**16)
        monkeypatch.setattr(module, "CHUNK", 2**12)
    assert "a.jsonl:3: has no end of line" in refused("a.jsonl", lines(GOOD, GOOD) + b'{"text": "' + b"x" * 2**18)
    assert "a.json:1: is not valid JSON" in refused("a.json", b'[{"text": "' + b"x" * 2**18)


def test_the_error_of_a_chat_template_is_quoted(refused, tmp_path: Path) -> None:
    (tmp_path / "odd.jinja").write_text("{{ raise_exception('no system turns, please') }}")
    message = refused("a.jsonl", lines(GOOD), f"data.chat_template={tmp_path / 'odd.jinja'}")
    assert "a.jsonl:1: the chat template refuses the turns: no system turns, please" in message


def test_a_broken_chat_template_is_named(refused, tmp_path: Path) -> None:
    (tmp_path / "odd.jinja").write_text("{% for message in messages %}{{ message.content }}")
    assert "the chat template" in refused("a.jsonl", lines(GOOD), f"data.chat_template={tmp_path / 'odd.jinja'}")


def test_a_tokenizer_without_a_template_lists_the_bundled_ones(refused, tmp_path: Path) -> None:
    shutil.copytree(CLONE / "examples/tokenizer", tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "bare/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "bare/tokenizer_config.json").write_text(json.dumps(settings))
    message = refused("a.jsonl", lines(GOOD), f"model.tokenizer={tmp_path / 'bare'}")
    assert "the tokenizer has no chat template: set data.chat_template to one of chatml" in message


def test_held_out_rows_that_are_also_trained_on_are_named(refused, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_bytes(lines(GOOD))
    rows = lines(GOOD, *({"instruction": f"Say {n}.", "output": "Hi."} for n in range(3)))
    message = refused("a.jsonl", rows, f"data.validation_path={tmp_path / 'held.jsonl'}")
    assert "data.gates.overlap" in message
    assert "held.jsonl:1" in message


@pytest.mark.parametrize("path", ["nowhere.jsonl", "no/*.jsonl", "empty"])
def test_a_path_without_data_is_named(path, compose, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file|has no file ending in"):
        preprocess.run(compose(f"run_dir={tmp_path}/run", f"data.path={tmp_path / path}"))
