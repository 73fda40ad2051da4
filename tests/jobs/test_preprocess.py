"""Rows to tokens: formats, masks, splits, several sets, and what the gates let through."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from conf.errors import DataError
from conf.files import read_json
from jobs import preprocess
from jobs.data import batches
from jobs.tokenization.tokenizer import load_tokenizer
from tests.jobs.ranks import CLONE

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(100)]


@pytest.fixture(scope="session")
def words():
    return AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")


@pytest.fixture
def run(compose, tmp_path):
    """Preprocess rows under overrides; returns the data folder. More sets: `rows` is a dictionary of name to rows."""

    def preprocessed(rows, *words):
        sets = rows if isinstance(rows, dict) else {"rows": rows}
        for name, some in sets.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        named = [f"data.path={tmp_path}/rows.jsonl"]
        if isinstance(rows, dict):
            named = ["data=mix", *(f"+data.sets.{name}.path={tmp_path}/{name}.jsonl" for name in sets)]
        preprocess.run(compose(f"run_dir={tmp_path}/run", *named, *words))
        return tmp_path / "run/data"

    return preprocessed


def texts(folder, split, words):
    """Every sample of a split, decoded, with what is trained of it."""
    rows = batches.read(folder, split)
    pairs = (rows.samples[number] for number in rows.chosen.tolist())
    return [(words.decode(ids), words.decode(ids[trained == 1])) for ids, trained in pairs]


CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]
OTHER = [{"role": "user", "content": "Say ho."}, {"role": "assistant", "content": "Ho."}]


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (
            [
                {"instruction": "Say hi.", "input": "", "output": "Hi."},
                {"instruction": "Say ho.", "input": "", "output": "Ho."},
            ],
            "alpaca",
        ),
        ([{"messages": CHAT}, {"messages": OTHER}], "messages"),
        (
            [
                {"conversations": [{"from": "human", "value": f"Say h{x}."}, {"from": "gpt", "value": f"H{x}."}]}
                for x in "io"
            ],
            "sharegpt",
        ),
        (
            [{"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": OTHER[:1], "completion": OTHER[1:]}],
            "prompt_completion",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "rows",
)
def test_every_chat_shape_becomes_the_same_tokens(rows, shape, run, words):
    folder = run(rows)
    both = sorted(texts(folder, "train", words) + texts(folder, "validation", words))
    assert read_json(folder / "data.json")["sets"]["sample"]["format"] == shape
    assert both == [
        (f"<|im_start|>user\nSay h{x}.<|im_end|>\n<|im_start|>assistant\nH{x}.<|im_end|>\n", f"H{x}.<|im_end|>")
        for x in "io"
    ]


def test_fields_reach_any_other_schema(run, words):
    rows = [{"q": f"Say {x}.", "a": "Hi."} for x in "abcd"]
    folder = run(rows, "data.format=alpaca", "+data.fields={instruction: q, output: a}")
    assert any("Say b." in text for text, _ in texts(folder, "train", words) + texts(folder, "validation", words))


def test_text_is_trained_whole_and_ends(run, words):
    folder = run([{"text": f"The queue holds {n} jobs."} for n in range(4)])
    for text, trained in texts(folder, "train", words):
        assert text == trained
        assert text.endswith("jobs.<|im_end|>")


def test_held_out_rows_are_fixed_by_content_and_seed_and_none_is_lost(run, words, tmp_path):
    folder = run(ROWS, "data.validation_fraction=0.25")
    train, held = (set(texts(folder, split, words)) for split in ("train", "validation"))
    assert len(train) + len(held) == 100
    assert not train & held
    assert 15 <= len(held) <= 35
    (tmp_path / "run").rename(tmp_path / "before")
    longer = run(
        [*ROWS[::-1], *({**ROWS[0], "output": f"No, {n}."} for n in range(50))], "data.validation_fraction=0.25"
    )
    assert held <= set(texts(longer, "validation", words)), "a row changed sides because others were added"


def test_equal_rows_are_never_on_both_sides(run, words):
    folder = run(ROWS * 2, "data.gates.duplicates=1", "data.validation_fraction=0.25")
    assert not set(texts(folder, "train", words)) & set(texts(folder, "validation", words))


def test_duplicates_can_be_dropped(run):
    folder = run(ROWS * 2, "data.drop_duplicates=true", "data.validation_fraction=0.1")
    rows = batches.read(folder, "train")
    assert len(rows) == len({tuple(rows.samples[number][0].tolist()) for number in rows.chosen.tolist()})


@pytest.mark.parametrize(
    ("policy", "more", "expected"),
    [("truncate", ["data.gates.overlong=1"], 20), ("drop", ["data.gates.overlong=1"], None), ("split", [], 140)],
)
def test_overlong_rows_are_cut_split_or_dropped(policy, more, expected, run):
    long = [{"text": " and ".join(str(n * 100 + k) for k in range(60))} for n in range(20)]
    asked = ["data.max_length=32", f"data.overlong={policy}", *more]
    if expected is None:
        with pytest.raises(DataError, match="leaves no samples"):
            run(long, *asked)
        return
    folder = run(long, *asked)
    train, held = batches.read(folder, "train"), batches.read(folder, "validation")
    assert max(train.lengths.max(), held.lengths.max()) <= 32
    assert (len(train) + len(held) == 20) is (policy == "truncate")
    if policy == "split":
        assert train.lengths.sum() + held.lengths.sum() > 20 * 100


def test_sets_come_as_often_as_their_weights_say(run, words):
    sets = {name: [{"text": f"{name} {n}."} for n in range(100)] for name in ("once", "twice", "half", "some")}
    folder = run(
        sets, "+data.sets.twice.weight=2", "+data.sets.half.weight=0.5", "+data.sets.some.num_samples=7",
        "data.validation_fraction=0.001",
    )  # fmt: skip
    found = [text.split(" ")[0] for text, _ in texts(folder, "train", words)]
    assert [found.count(name) for name in ("once", "some")] == [pytest.approx(100, abs=1), 7]
    assert found.count("twice") == pytest.approx(200, abs=2)
    assert found.count("half") == pytest.approx(50, abs=1)
    halves = [text for text, _ in texts(folder, "train", words) if text.startswith("half")]
    assert len(set(halves)) == len(halves)
    assert read_json(folder / "data.json")["sets"]["some"]["epoch"] == 7


def test_a_set_may_be_taken_more_often_than_it_has_rows(run, words):
    folder = run({"a": [{"text": f"a {n}."} for n in range(10)], "b": ROWS}, "+data.sets.a.num_samples=25",
                 "data.validation_fraction=0.001")  # fmt: skip
    found = [text for text, _ in texts(folder, "train", words) if text.startswith("a ")]
    assert len(found) == 25
    assert {found.count(text) for text in set(found)} <= {2, 3}


@pytest.mark.parametrize(
    ("split", "expected"),
    [("[:7]", range(7)), ("[90:]", range(90, 100)), ("[10%:20%]", range(10, 20)), ("[-5:]", range(95, 100))],
)
def test_a_part_of_a_file_is_taken_as_python_counts(split, expected, run, words):
    folder = run([{"text": f"Number {n}."} for n in range(100)], f"data.split='{split}'")
    both = texts(folder, "train", words) + texts(folder, "validation", words)
    assert {text for text, _ in both} == {f"Number {n}.<|im_end|>" for n in expected}


def test_training_and_held_out_rows_may_be_parts_of_one_file(run, words, tmp_path):
    folder = run([{"text": f"Number {n}."} for n in range(100)], "data.split='[:90]'", "data.validation_split='[90:]'",
                 f"data.validation_path={tmp_path}/rows.jsonl")  # fmt: skip
    assert (len(batches.read(folder, "train")), len(batches.read(folder, "validation"))) == (90, 10)


def test_rows_that_a_gate_lets_through_are_left_out_and_said(run, capsys, words):
    rows = [*ROWS, {"instruction": "a", "output": ""}, {"instruction": None, "output": "b"}]
    folder = run(rows, "data.gates.empty=0.05", "data.gates.unusable=0.05")
    said = capsys.readouterr().out
    assert "1 of 102 rows have an empty question or answer (0.98%, data.gates.empty=0.05)" in said
    assert "rows.jsonl:101" in said
    assert "rows.jsonl:102" in said
    assert len(texts(folder, "train", words)) + len(texts(folder, "validation", words)) == 100


def test_all_gates_that_stop_speak_at_once(run):
    rows = [
        *ROWS,
        {"instruction": "a", "output": ""},
        {"a": 1},
        *[{"messages": [{"role": "wizard", "content": "x"}, *CHAT]}] * 20,
    ]
    with pytest.raises(DataError) as caught:
        run(rows, "data.format=messages")
    said = str(caught.value)
    assert "data.gates.unusable=0: 102 of 122 rows" in said
    assert "data.gates.roles=0: 20 of 122 rows" in said
    assert "and 10 more" in said


def test_the_page_and_the_log_show_what_is_trained(run, tmp_path, capsys):
    folder = run(ROWS)
    page = (folder / "preview.html").read_text()
    assert "rows.jsonl:" in page
    assert "\033[32mIt is" in capsys.readouterr().out


def test_the_order_of_an_epoch_is_the_inputs_where_that_is_asked(run, words, compose, tmp_path):
    folder = run([{"text": f"Number {n}."} for n in range(100)], "data.order=file")
    rows = batches.read(folder, "train")
    order = batches.ordered(rows, compose("data.order=file", "train.global_batch=10"), 100.0)
    assert np.array_equal(np.sort(order.rows_of(0)), np.arange(10))


def test_a_named_template_goes_with_the_tokenizer(compose):
    own, named = (load_tokenizer(compose(*words)).chat_template for words in ([], ["data.chat_template=chatml"]))
    assert own != named
    with pytest.raises(DataError, match="llama3.*which the tokenizer does not have"):
        load_tokenizer(compose("data.chat_template=llama3"))
