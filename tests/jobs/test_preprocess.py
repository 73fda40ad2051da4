"""Rows to tokens: formats, masks, splits, and messages that name the file and the line."""

import json

import pytest
from transformers import AutoTokenizer

from conf.errors import DataError
from conf.files import read_json
from jobs import data, preprocess
from tests.jobs.ranks import CLONE

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(20)]


@pytest.fixture(scope="session")
def words():
    return AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")


@pytest.fixture
def run(compose, tmp_path):
    """Preprocess rows under overrides; returns the data folder."""

    def preprocessed(rows, *words):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        preprocess.run(compose(f"run_dir={tmp_path}/run", f"data.path={path}", *words))
        return tmp_path / "run/data"

    return preprocessed


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"instruction": "Say hi.", "input": "", "output": "Hi."}, id="alpaca"),
        pytest.param(
            {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
            id="messages",
        ),
    ],
)
def test_only_the_answer_and_its_end_are_trained(row, words, compose):
    shape = preprocess.recognise(row, compose())
    ids, trained = preprocess._encode_chat(preprocess._messages(row, shape), words)
    assert words.decode(ids).startswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")
    assert words.decode([token for token, mask in zip(ids, trained, strict=True) if mask]) == "Hi.<|im_end|>"


def test_a_template_without_marks_gives_the_same_mask(words):
    plain = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    plain.chat_template = words.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns = [("user", "Say hi."), ("assistant", "Hi."), ("user", "Again."), ("assistant", "Hi again.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    marked, counted = preprocess._encode_chat(messages, words), preprocess._encode_chat(messages, plain)
    assert marked[0] == counted[0]
    shown = [words.decode([t for t, m in zip(ids, mask, strict=True) if m]) for ids, mask in (marked, counted)]
    assert shown[0] == "Hi.<|im_end|>Hi again.<|im_end|>"
    assert shown[1].replace("\n", "") == shown[0]  # a template may end a turn with a newline that has no mark


def test_text_rows_are_trained_whole_and_end(words):
    ids, trained = preprocess._encode_text({"text": "The queue is empty."}, words)
    assert ids[-1] == words.eos_token_id
    assert all(trained)


def test_the_split_is_fixed_by_the_seed_and_loses_no_row(run):
    folder = run(ROWS, "data.validation_fraction=0.25")
    train, held = data.read(folder, "train"), data.read(folder, "validation")
    assert (len(train), len(held)) == (15, 5)
    assert read_json(folder / "data.json")["train rows"] == 15


@pytest.mark.parametrize(("policy", "rows"), [("drop", None), ("truncate", 20)])
def test_overlong_rows_are_counted(policy, rows, run, words):
    long = [{**ROWS[0], "output": "It is very " + "very " * 200}] * 20
    if rows is None:
        with pytest.raises(DataError, match="leaves no rows"):
            run(long, "data.max_length=32", f"data.overlong={policy}")
    else:
        assert (
            read_json(run(long, "data.max_length=32", f"data.overlong={policy}") / "data.json")["train overlong"] == 19
        )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(
            b'{"instruction": "a", "output": "b"}\n{"instruction": ', r"rows\.jsonl:2.*not valid JSON", id="truncated"
        ),
        pytest.param(b"[1, 2]", "object", id="not objects"),
        pytest.param(b"\n\n", "has no rows", id="empty"),
        pytest.param(b'{"instruction": "\xff", "output": "b"}', "not UTF-8", id="latin"),
        pytest.param(b'{"question": "a", "answer": "b"}', "does not fit the columns", id="columns"),
        pytest.param(b'[{"instruction": "a", "output": "b"},\n]', r"rows\.jsonl:2.*not valid JSON", id="array"),
    ],
)
def test_bad_input_names_file_and_line_and_leaves_nothing(content, said, compose, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        preprocess.run(compose(f"run_dir={tmp_path}/run", f"data.path={path}"))
    assert not (tmp_path / "run/data").exists()


def test_a_row_that_cannot_be_rendered_is_named(run):
    good, bad = {"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}
    answer = {"role": "assistant", "content": "y"}
    with pytest.raises(DataError, match="row [123] of (train|validation).*cannot be rendered"):
        run([{"messages": [good, answer]}] * 2 + [{"messages": [bad, answer]}])
