"""jobs/evaluation/answer_checks.py: faults of answers, and the page that shows answers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.errors import DataError
from jobs import generate
from jobs.evaluation import answer_checks, prompts
from tests.conftest import ROOT
from tests.pages.html import Parsed

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")


def faults_of(tokenizer, text):
    """The faults of an answer, written with its special tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return answer_checks.find_faults(
        ids, tokenizer.decode(ids, skip_special_tokens=True), answer_checks.special_tokens(tokenizer)
    )


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("squeue lists the jobs in the queue.<|im_end|>", []),
        ("squeue lists the jobs in the queue.", ["endless"]),
        (" \n<|im_end|>", ["empty"]),
        ("", ["empty", "endless"]),
        ("It lists<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>", ["template"]),
        ("It does." + " It lists the jobs." * 12 + "<|im_end|>", ["looping"]),
        ("It does." + " It lists the jobs." * 12, ["looping", "endless"]),
    ],
)
def test_faults(text: str, faults: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    assert faults_of(tokenizer, text) == faults


@pytest.mark.parametrize(
    ("answer", "question", "repeats"),
    [
        ("What does squeue do? It lists jobs.", "What does  SQUEUE do?", True),
        ("It lists jobs.", "What does squeue do?", False),
        ("Paris is a city.", "Paris?", False),  # too short to tell
    ],
)
def test_an_answer_that_repeats_its_question(answer: str, question: str, repeats: bool) -> None:
    assert answer_checks.repeats(answer, question) is repeats


def test_prompts_of_several_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"prompt": "p", "reference": "r"},
        {"messages": turns},
        {"messages": [{"role": "system", "content": "own"}, turns[0]]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, several, own = prompts.read(tmp_path / "p.jsonl", "be kind")
    system = {"role": "system", "content": "be kind"}
    assert one.messages == [system, {"role": "user", "content": "p"}] and one.reference == "r" and one.question == "p"
    assert several.messages == [system, *turns] and several.question == "c"
    assert own.messages[0]["content"] == "own"


@pytest.mark.parametrize(
    "row",
    ['{"question": "a"}', '{"messages": []}', '{"messages": [{"role": "assistant", "content": "a"}]}', "[1]", "{"],
)
def test_a_prompt_of_another_form_is_refused_with_its_line(row: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"p.jsonl:2: is not of the form"):
        prompts.read(tmp_path / "p.jsonl", None)


def test_a_marker_of_ordinary_tokens_is_noticed(tokenizer: PreTrainedTokenizerBase) -> None:
    known = answer_checks.special_tokens(tokenizer)
    assert "<|im_start|>" in known.markers
    assert answer_checks.find_faults([*range(5, 30), *known.end_ids][:26], "so <|im_start|>user", known) == ["template"]


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([7] * 24, True),
        ([7] * 23, False),
        ([1, *[7] * 24], True),
        ([*[7] * 24, 1], False),
        ([1, 2, 3, 4, 5, 6, 7, 8] * 3, True),
        ([*range(20), *range(20)], False),
        ([*range(20)] * 3, True),
        ([*range(64)] * 3, True),
        ([*range(65)] * 3, False),
        ([*range(3, 20), *[*range(20)] * 2, *range(20)], True),
        ([*range(60)], False),
    ],
)
def test_loops(ids: list[int], loops: bool) -> None:
    assert answer_checks.ends_in_loop(ids) is loops


def test_the_page_is_complete_and_escapes_all_text() -> None:
    one = {
        "prompt": EVIL,
        "messages": [{"role": "system", "content": EVIL}, {"role": "user", "content": EVIL}],
        "reference": EVIL,
        "base": EVIL,
        "answer": EVIL,
        "raw": EVIL + "<|im_end|>",
        "tokens": 9,
        "ended": True,
        "faults": ["looping"],
    }
    counts = dict.fromkeys(answer_checks.FAULTS, 0) | {"looping": 1}
    settings = {"max_new_tokens": 9, "system": EVIL}
    summary = {"model": "step-1 in bf16", "prompts": 1, "faults": counts, "settings": settings}
    page = generate.render_html(EVIL, [("model", EVIL)], summary, [one])
    parsed = Parsed()
    parsed.feed(page)
    parsed.close()
    assert not parsed.opened
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img", "link", "iframe"})
    # title, heading, base model, settings, system, prompt, answer, base, reference, and with its special tokens
    assert "".join(parsed.texts).count(EVIL) == 10
    assert "max_new_tokens=9" in page
    assert "1 end in a loop" in page and "looping</span>" in page
