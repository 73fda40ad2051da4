"""jobs/report/sample_records.py: the samples of preview.jsonl, their texts and the character ranges that are trained."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.data import token_dataset
from jobs.report import sample_records
from jobs.report.sample_records import FoundRow, SetSamples, render_jsonl, sample_fields, text_and_spans
from jobs.report.token_view import Decoder
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "examples/tokenizer")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: blanks are ▁, unknown characters are bytes, and the first blank of a text is dropped."""
    words = ["▁a", "▁Hello", "▁you", "▁", "x", "!"]
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: 2 + number for number, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": 8 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = tokenizers.decoders
    backend.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def check(tokenizer, ids, trained):
    """The text is that of an independent decode, and each border is where the decoded tokens before it end."""
    text, spans = text_and_spans(Decoder(tokenizer), np.array(ids, np.int32), np.array(trained, np.uint8))
    assert text == tokenizer.decode(ids)
    assert [begin for begin, _, _ in spans] == [0, *(end for _, end, _ in spans)][: len(spans)]
    assert not spans or spans[-1][1] == len(text)
    assert all(begin < end for begin, end, _ in spans)
    assert all(one[2] != other[2] for one, other in pairwise(spans))
    return [(text[begin:end], flag) for begin, end, flag in spans]


def test_spans_are_in_characters_of_the_decoded_text(tokenizer) -> None:
    parts = [
        ("<|im_start|>user\n¿Qué? 👩‍👩‍👧", False),
        (" 日本\u2028 😀<|im_end|>", True),
        ("\n\n", False),
        ("𝒳 end", True),
    ]
    encoded = [(tokenizer.encode(text, add_special_tokens=False), flag) for text, flag in parts]
    ids = [token for tokens, _ in encoded for token in tokens]
    trained = [flag for tokens, flag in encoded for _ in tokens]
    assert check(tokenizer, ids, trained) == parts


def test_a_character_of_several_tokens_belongs_to_the_span_of_its_last_token(tokenizer) -> None:
    smile = tokenizer.encode("😀", add_special_tokens=False)
    letters = tokenizer.encode("ab", add_special_tokens=False)
    assert len(smile) > 1
    for cut in range(1, len(smile)):
        flags = [0] * (len(letters) + cut) + [1] * (len(smile) - cut + len(letters))
        assert check(tokenizer, [*letters, *smile, *letters], flags) == [("ab", False), ("😀ab", True)]
    assert check(tokenizer, [*smile, *letters], [1, *[0] * (len(smile) - 1 + len(letters))]) == [("😀ab", False)]


def test_a_long_sample_with_borders_inside_characters_keeps_them_whole(
    tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("one 😀 two [日本] <|im_end|>\n" * 40, add_special_tokens=False)
    trained = [number // 7 % 2 for number in range(len(ids))]
    exact = check(tokenizer, ids, trained)
    monkeypatch.setattr(sample_records, "PREFIX_TOKENS", 0)
    assert check(tokenizer, ids, trained) == exact


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_in_any_mask_give_the_decoded_text(tokenizer, seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(0, len(tokenizer), 60).tolist()  # most are parts of characters, or stray bytes
    check(tokenizer, ids, random.integers(0, 2, 60).tolist())


def test_a_tokenizer_that_drops_the_first_blank_keeps_the_others() -> None:
    tokenizer = sentencepiece()
    euro = [8 + byte for byte in "€".encode()]
    assert check(tokenizer, [3, 4, *euro, 4, 1], [0, 0, 0, 0, 0, 1, 1]) == [("Hello you€", False), (" you</s>", True)]
    assert check(tokenizer, [3, 4, *euro, 7], [0, 0, 0, 1, 1, 1]) == [("Hello you", False), ("€!", True)]
    smiles = [8 + byte for byte in "€😀".encode()]
    assert check(tokenizer, [3, *smiles, 4], [0] * 5 + [1] * 4) == [("Hello€", False), ("😀 you", True)]


def test_no_tokens_have_no_text_and_no_spans(tokenizer) -> None:
    assert check(tokenizer, [], []) == []


def test_a_long_sample_is_cut_and_says_so(tokenizer) -> None:
    ids = np.array(tokenizer.encode("😀 word " * 50, add_special_tokens=False), np.int32)
    trained = np.arange(len(ids)) % 7 < 3
    whole = sample_fields(Decoder(tokenizer), ids, trained, 10_000)
    assert "cut" not in whole
    for limit in (40, 50, 340):
        cut = sample_fields(Decoder(tokenizer), ids, trained, limit)
        assert cut["cut"] is True
        assert cut["tokens"] == whole["tokens"] == len(ids)
        assert whole["text"].startswith(cut["text"])
        assert len(cut["text"]) <= limit
        assert cut["spans"][:-1] == whole["spans"][: len(cut["spans"]) - 1]
        assert cut["spans"][-1][1] == len(cut["text"])


def set_of(tokenizer, texts, *, rows=None, **more) -> SetSamples:
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    part = token_dataset.Part(
        np.concatenate(encoded).astype(np.int32),
        np.ones(sum(map(len, encoded)), np.uint8),
        np.cumsum([0, *map(len, encoded)]),
    )
    numbers = np.arange(len(texts))
    values = {
        "name": "a",
        "rows": rows or len(texts),
        "samples": token_dataset.from_parts([part]),
        "numbers": range(len(texts)),
        "location_of": lambda number: f"a.jsonl:{number + 1}",
        "chosen": {"train": numbers[5:], "validation": numbers[:5]},
        "found": [],
    }
    return SetSamples(**values | more)


def records(*sets, tokenizer, seed=0):
    return [json.loads(line) for line in render_jsonl(sets, Decoder(tokenizer), seed).splitlines()]


def test_all_samples_of_a_small_set_are_shown_with_their_splits(tokenizer) -> None:
    found = records(set_of(tokenizer, [f"number {n}" for n in range(100)]), tokenizer=tokenizer)
    assert [record["text"] for record in found] == [f"number {n}" for n in range(100)]
    assert [record["split"] for record in found] == ["validation"] * 5 + ["train"] * 95
    assert found[7] == {
        **{"set": "a", "split": "train", "why": "first", "source": "a.jsonl:8"},
        **{"text": "number 7", "spans": [[0, 8, True]], "tokens": found[7]["tokens"]},
    }


def test_the_first_and_random_samples_of_a_large_set_are_shown(tokenizer) -> None:
    large = set_of(tokenizer, [f"number {n}" for n in range(400)])
    found = records(large, tokenizer=tokenizer)
    assert [record["source"] for record in found if record["why"] == "first"] == [f"a.jsonl:{n + 1}" for n in range(8)]
    drawn = [record for record in found if record["why"] == "random"]
    assert [record["split"] for record in drawn] == ["train"] * 8 + ["validation"] * 4
    assert found == records(large, tokenizer=tokenizer)
    assert found != records(large, tokenizer=tokenizer, seed=1)


def test_a_sample_that_the_run_does_not_use_has_no_split(tokenizer) -> None:
    found = records(set_of(tokenizer, ["one", "two"], chosen={"train": np.array([1])}), tokenizer=tokenizer)
    assert [record["split"] for record in found] == [None, "train"]


def test_rows_that_gates_found_are_shown_with_their_samples_or_with_the_error(tokenizer) -> None:
    rows = [FoundRow("overlong", "a.jsonl:2", "9 tokens", [1]), FoundRow("unusable", "a.jsonl:9", "no «text»", [])]
    found = records(set_of(tokenizer, ["one", "two"], found=rows), tokenizer=tokenizer)[2:]
    assert (found[0]["why"], found[0]["source"], found[0]["text"]) == ("gate: overlong", "a.jsonl:2", "two")
    assert found[1] == {"set": "a", "why": "gate: unusable", "source": "a.jsonl:9", "error": "no «text»"}


def test_a_line_is_one_line_for_every_reader_and_text_stays_readable(tokenizer) -> None:
    text = 'Zürich\u2028"日本"\x85\x0c\n\r\x1c😀'
    odd = set_of(tokenizer, [text], location_of=lambda _: "caf\udce9.jsonl:1")
    lines = render_jsonl([odd], Decoder(tokenizer), 0)
    lines.encode("utf-8")
    assert len(lines.splitlines()) == 1
    assert "Zürich" in lines
    assert "日本" in lines
    record = json.loads(lines)
    assert (record["text"], record["source"]) == (text, "caf\udce9.jsonl:1")


def test_the_file_is_bounded(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_records, "SAMPLE_CHARACTERS", 100)
    monkeypatch.setattr(sample_records, "ALL_CHARACTERS", 250)
    monkeypatch.setattr(sample_records, "LATER_CHARACTERS", 10)
    monkeypatch.setattr(sample_records, "MOST_SAMPLES", 6)
    found = records(set_of(tokenizer, ["word " * 90] * 8), tokenizer=tokenizer)
    assert [len(record["text"]) for record in found] == [100, 100, 100, 10, 10, 10]
    assert all(record["cut"] and record["tokens"] > 90 for record in found)
