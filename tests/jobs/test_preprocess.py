"""The preprocess job: formats, masks, splits, mixtures of sets, and quality gates."""

import json
from pathlib import Path

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
def tokenizer():
    return AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")


@pytest.fixture
def run(compose, tmp_path: Path):
    """Preprocesses rows with overrides, and returns the data folder. For several sets, `rows` is a dict of name to rows."""

    def preprocessed(rows, *overrides):
        sets = rows if isinstance(rows, dict) else {"rows": rows}
        for name, set_rows in sets.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in set_rows))
        paths = [f"data.path={tmp_path}/rows.jsonl"]
        if isinstance(rows, dict):
            paths = ["data=mix", *(f"+data.sets.{name}.path={tmp_path}/{name}.jsonl" for name in sets)]
        preprocess.run(compose(f"run_dir={tmp_path}/run", *paths, *overrides))
        return tmp_path / "run/data"

    return preprocessed


def texts(folder, split, tokenizer):
    """(text, trained part of the text) of every sample of a split."""
    rows = batches.load_split(folder, split)
    pairs = (rows.samples[number] for number in rows.chosen.tolist())
    return [(tokenizer.decode(ids), tokenizer.decode(ids[trained == 1])) for ids, trained in pairs]


CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]
OTHER = [{"role": "user", "content": "Say ho."}, {"role": "assistant", "content": "Ho."}]


@pytest.mark.parametrize(
    ("rows", "format_name"),
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
def test_every_chat_format_gives_the_same_tokens(rows, format_name, run, tokenizer) -> None:
    folder = run(rows)
    both = sorted(texts(folder, "train", tokenizer) + texts(folder, "validation", tokenizer))
    assert read_json(folder / "data.json")["sets"]["sample"]["format"] == format_name
    assert both == [
        (f"<|im_start|>user\nSay h{x}.<|im_end|>\n<|im_start|>assistant\nH{x}.<|im_end|>\n", f"H{x}.<|im_end|>")
        for x in "io"
    ]


def test_fields_map_other_columns(run, tokenizer) -> None:
    rows = [{"q": f"Say {x}.", "a": "Hi."} for x in "abcd"]
    folder = run(rows, "data.format=alpaca", "+data.fields={instruction: q, output: a}")
    assert any(
        "Say b." in text for text, _ in texts(folder, "train", tokenizer) + texts(folder, "validation", tokenizer)
    )


def test_all_of_a_text_is_trained_and_it_ends_with_an_end_token(run, tokenizer) -> None:
    folder = run([{"text": f"The queue holds {n} jobs."} for n in range(4)])
    for text, trained in texts(folder, "train", tokenizer):
        assert text == trained
        assert text.endswith("jobs.<|im_end|>")


def test_held_out_rows_stay_held_out_when_rows_are_added(run, tokenizer, tmp_path: Path) -> None:
    folder = run(ROWS, "data.validation_fraction=0.25")
    train, held = (set(texts(folder, split, tokenizer)) for split in ("train", "validation"))
    assert len(train) + len(held) == 100
    assert not train & held
    assert 15 <= len(held) <= 35
    (tmp_path / "run").rename(tmp_path / "before")
    longer = run(
        [*ROWS[::-1], *({**ROWS[0], "output": f"No, {n}."} for n in range(50))], "data.validation_fraction=0.25"
    )
    assert held <= set(texts(longer, "validation", tokenizer)), "a row changed its side because others were added"


def test_equal_rows_are_never_on_both_sides(run, tokenizer) -> None:
    folder = run(ROWS * 2, "data.gates.duplicates=1", "data.validation_fraction=0.25")
    assert not set(texts(folder, "train", tokenizer)) & set(texts(folder, "validation", tokenizer))


def test_duplicates_can_be_dropped(run) -> None:
    folder = run(ROWS * 2, "data.drop_duplicates=true", "data.validation_fraction=0.1")
    rows = batches.load_split(folder, "train")
    assert len(rows) == len({tuple(rows.samples[number][0].tolist()) for number in rows.chosen.tolist()})


@pytest.mark.parametrize(
    ("policy", "more", "expected"),
    [("truncate", ["data.gates.overlong=1"], 20), ("drop", ["data.gates.overlong=1"], None), ("split", [], 140)],
)
def test_overlong_rows_are_truncated_split_or_dropped(policy, more, expected, run) -> None:
    long = [{"text": " and ".join(str(n * 100 + k) for k in range(60))} for n in range(20)]
    overrides = ["data.max_length=32", f"data.overlong={policy}", *more]
    if expected is None:
        with pytest.raises(DataError, match="leaves no samples"):
            run(long, *overrides)
        return
    folder = run(long, *overrides)
    train, held = batches.load_split(folder, "train"), batches.load_split(folder, "validation")
    assert max(train.lengths.max(), held.lengths.max()) <= 32
    assert (len(train) + len(held) == 20) is (policy == "truncate")
    if policy == "split":
        assert train.lengths.sum() + held.lengths.sum() > 20 * 100


def test_weights_decide_how_often_a_set_appears(run, tokenizer) -> None:
    sets = {name: [{"text": f"{name} {n}."} for n in range(100)] for name in ("once", "twice", "half", "some")}
    folder = run(
        sets, "+data.sets.twice.weight=2", "+data.sets.half.weight=0.5", "+data.sets.some.num_samples=7",
        "data.validation_fraction=0.001",
    )  # fmt: skip
    names = [text.split(" ")[0] for text, _ in texts(folder, "train", tokenizer)]
    assert [names.count(name) for name in ("once", "some")] == [pytest.approx(100, abs=1), 7]
    assert names.count("twice") == pytest.approx(200, abs=2)
    assert names.count("half") == pytest.approx(50, abs=1)
    halves = [text for text, _ in texts(folder, "train", tokenizer) if text.startswith("half")]
    assert len(set(halves)) == len(halves)
    assert read_json(folder / "data.json")["sets"]["some"]["epoch"] == 7


def test_num_samples_can_exceed_the_rows_of_a_set(run, tokenizer) -> None:
    folder = run({"a": [{"text": f"a {n}."} for n in range(10)], "b": ROWS}, "+data.sets.a.num_samples=25",
                 "data.validation_fraction=0.001")  # fmt: skip
    samples = [text for text, _ in texts(folder, "train", tokenizer) if text.startswith("a ")]
    assert len(samples) == 25
    assert {samples.count(text) for text in set(samples)} <= {2, 3}


@pytest.mark.parametrize(
    ("split", "expected"),
    [("[:7]", range(7)), ("[90:]", range(90, 100)), ("[10%:20%]", range(10, 20)), ("[-5:]", range(95, 100))],
)
def test_a_part_of_a_file_follows_python_slices(split, expected, run, tokenizer) -> None:
    folder = run([{"text": f"Number {n}."} for n in range(100)], f"data.split='{split}'")
    both = texts(folder, "train", tokenizer) + texts(folder, "validation", tokenizer)
    assert {text for text, _ in both} == {f"Number {n}.<|im_end|>" for n in expected}


def test_training_and_held_out_rows_can_be_parts_of_one_file(run, tokenizer, tmp_path: Path) -> None:
    folder = run([{"text": f"Number {n}."} for n in range(100)], "data.split='[:90]'", "data.validation_split='[90:]'",
                 f"data.validation_path={tmp_path}/rows.jsonl")  # fmt: skip
    assert (len(batches.load_split(folder, "train")), len(batches.load_split(folder, "validation"))) == (90, 10)


def test_unusable_rows_below_the_limit_are_left_out_with_a_warning(
    run, capsys: pytest.CaptureFixture[str], tokenizer
) -> None:
    rows = [*ROWS, {"instruction": "a", "output": ""}, {"instruction": None, "output": "b"}]
    folder = run(rows, "data.gates.empty=0.05", "data.gates.unusable=0.05")
    output = capsys.readouterr().out
    assert "1 of 102 rows have an empty question or answer (0.98%, data.gates.empty=0.05)" in output
    assert "rows.jsonl:101" in output
    assert "rows.jsonl:102" in output
    assert len(texts(folder, "train", tokenizer)) + len(texts(folder, "validation", tokenizer)) == 100


def test_all_gates_that_stop_the_run_are_in_one_error(run) -> None:
    rows = [
        *ROWS,
        {"instruction": "a", "output": ""},
        {"a": 1},
        *[{"messages": [{"role": "wizard", "content": "x"}, *CHAT]}] * 20,
    ]
    with pytest.raises(DataError) as caught:
        run(rows, "data.format=messages")
    output = str(caught.value)
    assert "data.gates.unusable=0: 102 of 122 rows" in output
    assert "data.gates.roles=0: 20 of 122 rows" in output
    assert output.count("messages[0].role is 'wizard'") == 3
    assert "and 17 more with the same reason" in output


def test_the_preview_and_the_log_show_trained_tokens(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(ROWS)
    page = (folder / "preview.html").read_text()
    assert "rows.jsonl:" in page
    output = capsys.readouterr().out
    assert "«It is" in output
    assert "\033" not in output, "a log file must not have color codes"


def test_order_file_keeps_the_order_of_the_input(run, tokenizer, compose, tmp_path: Path) -> None:
    folder = run([{"text": f"Number {n}."} for n in range(100)], "data.order=file")
    rows = batches.load_split(folder, "train")
    order = batches.training_order(rows, compose("data.order=file", "train.global_batch=10"), 100.0)
    assert np.array_equal(np.sort(order.rows_of(0)), np.arange(10))


def test_a_bundled_template_replaces_that_of_the_tokenizer(compose) -> None:
    own, named = (load_tokenizer(compose(*words)).chat_template for words in ([], ["data.chat_template=chatml"]))
    assert own != named
    with pytest.raises(DataError, match="llama3.*which the tokenizer does not have"):
        load_tokenizer(compose("data.chat_template=llama3"))
