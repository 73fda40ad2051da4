"""Rows to tokens: formats, masks, splits, and messages that name the file and the line."""

import json
import re

import pytest
from transformers import AutoTokenizer

from conf.errors import DataError
from conf.files import read_json
from jobs import data, model, preprocess
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


CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"instruction": "Say hi.", "input": "", "output": "Hi."}, "alpaca"),
        ({"messages": CHAT}, "messages"),
        ({"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]}, "sharegpt"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion"),
    ],
    ids=lambda value: value if isinstance(value, str) else "row",
)
def test_every_chat_shape_becomes_the_same_tokens(row, shape, run, words):
    folder = run([row] * 4)
    split = data.read(folder, "train")
    ids, trained = split.tokens[: split.offsets[1]], split.trained[: split.offsets[1]]
    assert read_json(folder / "data.json")["format"] == shape
    assert words.decode(ids) == "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    assert words.decode(ids[trained == 1]) == "Hi.<|im_end|>"


def test_fields_reach_any_other_schema(run, words):
    rows = [{"q": "Say hi.", "a": "Hi."}] * 4
    split = data.read(run(rows, "data.format=alpaca", "+data.fields={instruction: q, output: a}"), "train")
    assert "Say hi." in words.decode(split.tokens[: split.offsets[1]])


def test_text_is_trained_whole_and_ends(run, words):
    split = data.read(run([{"text": "The queue is empty."}] * 4), "train")
    assert words.decode(split.tokens[: split.offsets[1]]) == "The queue is empty.<|im_end|>"
    assert split.trained.all()


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
        pytest.param(b'{"a": "b", "c": "d"}', "no known format has the columns a, c", id="columns"),
        pytest.param(
            b'[{"instruction": "a", "output": "b"},\n{"instruction": ]', r"rows\.jsonl:2.*not valid JSON", id="array"
        ),
    ],
)
def test_bad_input_names_file_and_line_and_leaves_nothing(content, said, compose, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        preprocess.run(compose(f"run_dir={tmp_path}/run", f"data.path={path}"))
    assert not (tmp_path / "run/data").exists()


def test_all_rows_that_cannot_be_used_are_named(run):
    bad = {"messages": [{"role": "wizard", "content": "x"}, *CHAT]}
    with pytest.raises(DataError) as caught:
        run([{"messages": CHAT}] * 2 + [bad, {"messages": None}, *[bad] * 20], "data.validation_fraction=0")
    said = str(caught.value).splitlines()
    assert re.fullmatch(r"2\d of 2\d rows cannot be used as messages:", said[0])
    assert re.search(r"rows\.jsonl:\d+: .*wizard", said[1])
    assert said[-1].endswith("more")


def test_a_named_template_goes_with_the_tokenizer(compose):
    own, named = (model.tokenizer(compose(*words)).chat_template for words in ([], ["data.chat_template=chatml"]))
    assert own != named
    with pytest.raises(DataError, match="llama3.*no token of this tokenizer"):
        model.tokenizer(compose("data.chat_template=llama3"))
