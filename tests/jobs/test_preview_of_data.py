"""What a user sees of a run's data: preview.jsonl, the log, errors of gates, and the remedies that they name."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conf.errors import DataError
from conf.files import read_json
from jobs import preprocess
from jobs.data import batches
from tests.jobs.ranks import CLONE

CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi 😀."}]


@pytest.fixture
def run(compose, tmp_path: Path):
    """Preprocesses rows with overrides, and returns the data folder."""

    def preprocessed(rows, *overrides, path="rows.jsonl"):
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        preprocess.run(compose(f"run_dir={tmp_path}/run", f"data.path={tmp_path}/{path}", *overrides))
        return tmp_path / "run/data"

    return preprocessed


@pytest.fixture
def refused(run):
    def message(rows, *overrides) -> str:
        with pytest.raises(DataError) as caught:
            run(rows, *overrides)
        return str(caught.value)

    return message


def texts(count, begin=0):
    return [{"text": f"The queue holds {n} jobs."} for n in range(begin, begin + count)]


def preview(folder, why=None):
    lines = (folder / "preview.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [record for record in found if why in (None, record["why"])]


def sizes(folder):
    return [len(batches.load_split(folder, split)) for split in ("train", "validation")]


def test_every_sample_of_a_small_set_is_in_the_preview_as_it_is_trained(run, tmp_path: Path) -> None:
    folder = run([{"messages": [*CHAT[:1], {"role": "assistant", "content": f"Hi 😀 {n}."}]} for n in range(30)])
    tokenizer = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    found = {record["source"]: record for record in preview(folder, "first")}
    assert list(found) == [f"{tmp_path}/rows.jsonl:{n}" for n in range(1, 31)]
    assert {record["set"] for record in found.values()} == {"sample"}
    for split in ("train", "validation"):
        rows = batches.load_split(folder, split)
        of_split = [record for record in found.values() if record["split"] == split]
        assert len(of_split) == len(rows)
        for record, number in zip(of_split, rows.chosen.tolist(), strict=True):
            ids, trained = rows.samples[number]
            assert (record["text"], record["tokens"]) == (tokenizer.decode(ids), len(ids))
            marked = [record["text"][begin:end] for begin, end, flag in record["spans"] if flag]
            assert marked == [tokenizer.decode(ids[trained == 1])]


def test_rows_that_gates_found_are_in_the_preview(run, tmp_path: Path) -> None:
    bad = [
        {"text": None},
        {"text": "long " * 90},
        {"text": "Fill {instruction} in."},
        *[{"text": "The queue holds 0 jobs."}] * 5,
    ]
    limits = [f"data.gates.{gate}=1" for gate in ("unusable", "overlong", "placeholders", "duplicates")]
    folder = run([*texts(200), *bad], *limits, "data.max_length=64", "data.validation_fraction=0")
    found = {record["why"]: record for record in preview(folder) if record["why"].startswith("gate: ")}
    assert found["gate: unusable"] == {
        **{"set": "sample", "why": "gate: unusable", "source": f"{tmp_path}/rows.jsonl:201"},
        "error": found["gate: unusable"]["error"],
    }
    assert "text" in found["gate: unusable"]["error"]
    assert found["gate: overlong"]["tokens"] == 64
    assert found["gate: overlong"]["text"].startswith("long long")
    assert found["gate: overlong"]["source"].endswith("rows.jsonl:202")
    assert "{instruction}" in found["gate: placeholders"]["text"]
    assert [record["source"][-3:] for record in preview(folder, "gate: duplicates")] == ["204", "205", "206"]
    assert found["gate: duplicates"]["text"] == "The queue holds 0 jobs.<|im_end|>"


def test_each_part_of_a_split_row_is_found_again(run) -> None:
    rows = [{"text": " and ".join(str(n * 100 + k) for k in range(60))} for n in range(2)]
    folder = run(rows, "data.max_length=32", "data.overlong=split", "data.validation_fraction=0")
    parts, found = preview(folder, "first"), preview(folder, "gate: overlong")
    assert [record["text"] for record in found] == [record["text"] for record in parts]
    assert sum(record["tokens"] for record in found) == read_json(folder / "data.json")["train"]["tokens"]


def test_held_out_rows_and_each_set_of_a_mixture_are_in_the_preview(compose, tmp_path: Path) -> None:
    for name, rows in {"a": texts(3), "b": texts(3, 100), "held": texts(1, 2)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"+data.sets.{name}.path={tmp_path}/{name}.jsonl" for name in "ab"]
    held = [f"data.validation_path={tmp_path}/held.jsonl", "data.gates.overlap=1", "+data.sets.b.num_samples=1"]
    preprocess.run(compose(f"run_dir={tmp_path}/run", "data=mix", *sets, *held))
    shown = [(item["set"], item["split"], item["why"], item["text"][:17]) for item in preview(tmp_path / "run/data")]
    used = [split for name, split, _, _ in shown if name == "b"]
    assert sorted(used, key=str) == [None, None, "train"]
    assert [item[:3] for item in shown if item[0] != "b"] == [
        *[("a", "train", "first")] * 3,
        ("held out", "validation", "first"),
        ("held out", "validation", "gate: overlap"),
    ]


# Colors, and errors once


def in_terminal(code: str, **variables: str) -> str:
    """What a program writes whose output is a terminal."""
    main, terminal = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=terminal, env=environment | {"TERM": "xterm"} | variables, cwd=CLONE
    ) as program:
        os.close(terminal)
        output = b""
        try:
            while piece := os.read(main, 4096):
                output += piece
        except OSError:  # the end of a terminal
            pass
        assert program.wait() == 0
    os.close(main)
    return output.decode()


@pytest.mark.parametrize(
    ("variables", "colored"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
    ids=str,
)
def test_colors_are_shown_only_where_the_terminal_and_the_user_want_them(variables, colored) -> None:
    code = "import sys; from jobs.report import terminal; print(terminal.supports_color(sys.stdout))"
    assert in_terminal(code, **variables).strip() == str(colored)


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}], ids=str)
def test_a_pipe_never_gets_colors(variables) -> None:
    code = "import sys; from jobs.report import terminal; print(terminal.supports_color(sys.stdout))"
    environment = os.environ | {"TERM": "xterm"} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=CLONE)
    assert done.stdout.strip() == "False"


def test_one_module_alone_writes_color_codes() -> None:
    sources = [path for folder in ("conf", "jobs", "launcher", "pages") for path in (CLONE / folder).rglob("*.py")]
    codes = [path for path in sources if re.search(r"\\033|\\x1b|\\u001b|\\e\[", path.read_text(), re.IGNORECASE)]
    assert codes == [CLONE / "jobs/report/terminal.py"]


def test_the_terminal_shows_an_error_once(tmp_path: Path) -> None:
    rows = [{"messages": [*CHAT[:1], {"role": "assistant", "content": None}]}] * 9
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch = [sys.executable, CLONE / "launch.py", "pipeline=preprocess", f"data.path={tmp_path}/rows.jsonl"]
    done = subprocess.run([*launch, f"run_dir={tmp_path}/run"], capture_output=True, text=True)
    assert done.returncode == 2
    shown = done.stdout + done.stderr
    assert [shown.count(f"rows.jsonl:{n}: ") for n in range(1, 10)] == [1] * 3 + [0] * 6
    assert shown.count("data.gates.unusable=0: 9 of 9 rows") == 1
    assert "data.gates.unusable=0: 9 of 9 rows" in done.stderr
    muster = [sys.executable, "-m", "launcher"]
    for command in ("status", "why"):
        shown = subprocess.run([*muster, command, tmp_path / "run"], capture_output=True, text=True, cwd=CLONE).stdout
        assert shown.count("data.gates.unusable=0: 9 of 9 rows") == 1
    log = next((tmp_path / "run/jobs/preprocess").glob("*_0_log.out")).read_text()
    assert "ERROR data.gates.unusable=0: 9 of 9 rows" in log


# Tiny sets


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_set_of_one_row_needs_validation_fraction_0_and_then_trains(refused, run, packing) -> None:
    message = refused(texts(1), f"data.packing={packing}")
    assert message == (
        "data.validation_fraction=0.05: holds out the only row, so none is left to train on. "
        "Use data.validation_fraction=0 to hold out nothing"
    )
    folder = run(texts(1), "data.validation_fraction=0", f"data.packing={packing}")
    assert sizes(folder) == [1, 0]
    assert read_json(folder / "data.json")["validation"] == {"samples": 0, "tokens": 0, "trained_tokens": 0}


def test_equal_rows_are_not_both_trained_and_held_out(refused, run) -> None:
    message = refused(texts(1) * 2, "data.gates.duplicates=1")
    assert "data.validation_fraction=0.05: holds out all 2 samples (they are equal, or parts of one row)" in message
    assert sizes(run(texts(1) * 2, "data.gates.duplicates=1", "data.validation_fraction=0")) == [2, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", ["0.05", "0.5"])
def test_of_two_rows_one_is_held_out(run, fraction, seed) -> None:
    assert sizes(run(texts(2), f"data.validation_fraction={fraction}", f"data.seed={seed}")) == [1, 1]


def test_validation_fraction_0_holds_out_nothing_of_many_rows(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes(run(texts(300), "data.validation_fraction=0")) == [300, 0]
    assert "held out  nothing, because data.validation_fraction=0" in capsys.readouterr().out


def test_a_bad_row_beside_one_good_row_is_what_the_error_names(refused) -> None:
    assert "data.gates.unusable=0: 1 of 2 rows" in refused([*texts(1), {"text": None}])


# Remedies: each is typed as the message says


TOO_LONG = [{"text": " and ".join(str(n * 100 + k) for k in range(60))} for n in range(20)]
CHATS = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "wizard", "content": "x"}]} for n in range(20)]
REPEATED, ALL = texts(1) * 9 + texts(20), ["data.validation_fraction=0"]
REMEDIES = [
    (TOO_LONG, ["data.max_length=32"], "raise data.max_length", ["data.max_length=512"]),
    (TOO_LONG, ["data.max_length=32"], "use data.overlong=split", ["data.max_length=32", "data.overlong=split"]),
    (TOO_LONG, ["data.max_length=32"], "raise this limit", ["data.max_length=32", "data.gates.overlong=1"]),
    (REPEATED, ALL, "use data.drop_duplicates=true", [*ALL, "data.drop_duplicates=true"]),
    (REPEATED, ALL, "raise this limit", [*ALL, "data.gates.duplicates=1"]),
    (CHATS, [], "map the roles with data.roles", ["+data.roles={wizard: assistant}"]),
    ([*texts(20), {"text": None}], [], "raise this limit", ["data.gates.unusable=0.05"]),
]
DROPPED = ["data.max_length=32", "data.overlong=drop", "data.gates.overlong=1"]
NONE_LEFT = [
    (TOO_LONG, DROPPED, "raise data.max_length", [*DROPPED, "data.max_length=512"]),
    (TOO_LONG, DROPPED, "use data.overlong=truncate", [*DROPPED, "data.overlong=truncate"]),
    (TOO_LONG, DROPPED, "data.overlong=split", [*DROPPED, "data.overlong=split"]),
]


@pytest.mark.parametrize(("rows", "words", "remedy", "remedied"), REMEDIES + NONE_LEFT)
def test_the_remedies_of_gates_work(refused, run, rows, words, remedy, remedied) -> None:
    assert remedy in refused(rows, *words)
    assert sizes(run(rows, *remedied))[0] > 0


def test_raising_max_length_gives_cut_off_answers_trained_tokens(refused, run) -> None:
    chats = [{"messages": [{"role": "user", "content": f"{n} " * 60}, CHAT[1]]} for n in range(20)]
    short = ["data.max_length=32", "data.gates.overlong=1"]
    message = refused(chats, *short)
    assert "data.gates.untrained=0.05: 20 of 20 rows" in message
    assert "raise data.max_length if the answers were cut off" in message
    assert "raise this limit" not in message, "no row would be left"
    assert sum(sizes(run(chats))) == 20


def test_rows_of_another_tokenizer_are_refused_and_its_name_helps(refused, run, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    tokenizer.add_tokens([f"<extra{n}>" for n in range(9)])
    tokenizer.save_pretrained(tmp_path / "larger")
    rows = [{"input_ids": [n, len(tokenizer) - 1, tokenizer.eos_token_id]} for n in range(9)]
    message = refused(rows)
    assert "data.gates.vocabulary=0: 9 of 9 rows" in message
    assert "set model.tokenizer to the tokenizer that made the rows" in message
    assert sum(sizes(run(rows, f"model.tokenizer={tmp_path}/larger"))) == 9


def test_weights_that_leave_no_row_are_named_with_their_remedy(compose, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(2)))
    words = [f"run_dir={tmp_path}/run", "data=mix", f"+data.sets.a.path={tmp_path}/a.jsonl"]
    with pytest.raises(DataError, match=r"data\.sets=.*a\.jsonl: leaves no samples for train of 2 rows: .*num_samples"):
        preprocess.run(compose(*words, "+data.sets.a.weight=0.01"))
    preprocess.run(compose(*words, "+data.sets.a.num_samples=1"))
    assert sizes(tmp_path / "run/data") == [1, 1]


def test_the_end_of_a_turn_that_no_known_token_ends_is_named(refused, run, tmp_path: Path) -> None:
    template = tmp_path / "hash.jinja"
    turns = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|stop|>{% endfor %}"
    template.write_text(turns + "{% if add_generation_prompt %}assistant:\n{% endif %}")
    chats = [{"messages": [{"role": "user", "content": f"Say {n}."}, CHAT[1]]} for n in range(20)]
    words = [f"data.chat_template={template}", "data.special_tokens=['<|stop|>']"]
    message = refused(chats, *words)
    assert "data.gates.endless=0.05: 20 of 20 rows do not end with an end-of-turn or end-of-text token" in message
    assert "name the tokens that end a turn of this chat template in data.end_of_turn" in message
    assert "'i 😀.<|stop|>'" in message, "the last tokens of the rows"
    folder = run(chats, *words, "data.end_of_turn=['<|stop|>']")
    trained = [record["text"][begin:end] for record in preview(folder) for begin, end, flag in record["spans"] if flag]
    assert trained == ["Hi 😀.<|stop|>"] * 20
