"""jobs/report: the preview of the training data, as a page and in the terminal."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.schema_model import Gates
from jobs.data import batches, quality_gates, token_dataset
from jobs.data.quality_gates import Findings
from jobs.report import charts, data_preview, token_view
from tests.conftest import ROOT
from tests.pages.html import EVIL, parsed


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")


def encoded(tokenizer, *turns):
    """(ids, trained) of several texts; every second one is trained."""
    ids, trained = [], []
    for number, text in enumerate(turns):
        part = tokenizer.encode(text, add_special_tokens=False)
        ids += part
        trained += [number % 2] * len(part)
    return ids, trained


def split(made, chosen=None, pack_into=None):
    """Rows of all samples, or of the chosen ones."""
    lengths = [len(ids) for ids, _ in made]
    part = token_dataset.Part(
        np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in made]),
        np.concatenate([np.asarray(trained, dtype=np.uint8) for _, trained in made]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return batches.make_rows(
        token_dataset.from_parts([part]), np.arange(len(made)) if chosen is None else chosen, pack_into
    )


def location(number):
    return f"rows.jsonl:{number + 1}"


def data_json(rows, sizes, validation=None):
    """The contents of data.json for sets of these sizes, one after the other."""
    sets, at = {}, 0
    for name, size in sizes.items():
        span = slice(at, at + size)
        sets[name] = {
            "source": f"/data/{name}.jsonl",
            "format": "alpaca",
            "rows": size,
            "samples": size,
            "tokens": int(rows.samples.lengths[span].sum()),
            "trained_tokens": int(rows.samples.label_counts[span].sum()),
            "epoch": size,
        }
        at += size
    totals = {
        name: {
            "samples": len(one.chosen),
            "tokens": int(one.lengths.sum()),
            "trained_tokens": int(one.label_counts.sum()),
        }
        for name, one in (("train", rows), ("validation", rows if validation is None else validation))
    }
    return {"sets": sets, "splits": {"train": list(sizes), "validation": list(sizes)}, **totals}


def made_page(tokenizer, rows, *, sizes=None, validation=None, verdicts=(), max_length=512, packed=False, **more):
    validation = rows if validation is None else validation
    return data_preview.render_html(
        data_json(rows, sizes or {"facts": len(rows.samples)}, validation),
        {"train": rows, "validation": validation},
        {"train": location, "validation": location},
        tokenizer,
        max_length=max_length,
        packed=packed,
        verdicts=verdicts,
        limits=Gates(),
        name="tiny",
        about=[("model", "llama8b"), ("chat template", "the tokenizer's own")],
        **more,
    )


def texts_of(decoder, ids):
    return [text for _, text in decoder.groups(ids)]


def test_token_groups_hold_the_whole_text_and_every_token(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Hello  wörld 😀👩‍👩‍👧 日本\n\tx <|im_end|> end "
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = list(token_view.Decoder(tokenizer).groups(ids))
    assert "".join(piece for _, piece in found) == text
    assert [token for tokens, _ in found for token in tokens] == ids
    assert token_view.REPLACEMENT_CHARACTER not in "".join(piece for _, piece in found)
    smile = next(tokens for tokens, piece in found if piece.strip() == "😀")
    assert len(smile) > 1, "no token of it can be read alone"


def test_a_stray_byte_leaves_its_neighbors_readable(tokenizer: PreTrainedTokenizerBase) -> None:
    stray = tokenizer.encode("😀", add_special_tokens=False)[:2]
    ids = tokenizer.encode("one", add_special_tokens=False)
    found = texts_of(token_view.Decoder(tokenizer), [*ids, *stray, *ids])
    assert "".join(found).startswith("one")
    assert "".join(found).endswith("one")
    assert token_view.REPLACEMENT_CHARACTER in "".join(found)


def test_a_long_run_of_stray_bytes_is_split(tokenizer: PreTrainedTokenizerBase) -> None:
    stray = tokenizer.encode("😀", add_special_tokens=False)[:1]
    found = list(token_view.Decoder(tokenizer).groups(stray * 100))
    assert sum(len(tokens) for tokens, _ in found) == 100


def test_tokens_keep_the_leading_space_that_some_tokenizers_strip() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁a": 1, "▁Hello": 2, "▁you": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    decoder = token_view.Decoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    euro = [4 + byte for byte in "€".encode()]
    assert list(decoder.groups([2, 3, *euro])) == [([2], " Hello"), ([3], " you"), (euro, "€")]


def test_the_terminal_shows_trained_tokens_in_green(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = split([encoded(tokenizer, "Why?\n", "So.\nYes.<|im_end|>")])
    shown = data_preview.render_terminal(rows, tokenizer, location, color=True)
    assert shown == (
        "sample    rows.jsonl:1: 10 tokens, 7 trained (in green)\n"
        "Why?\n\033[32mSo.\033[0m\n\033[32mYes.<|im_end|>\033[0m"
    ).replace("10 tokens, 7 trained", f"{rows.lengths[0]} tokens, {rows.label_counts[0]} trained")


def test_the_terminal_shows_trained_tokens_in_brackets_and_no_control_characters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = split([encoded(tokenizer, "a  b\t\x1b[2J\r", "c\u202e d")] * 3)
    shown = data_preview.render_terminal(rows, tokenizer, location, count=2, color=False)
    assert "a  b\t␛[2J␍«c‹U+202E› d»" in shown
    assert shown.count("sample    rows.jsonl:") == 2
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", shown)


def test_a_long_sample_shows_its_beginning_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = split([encoded(tokenizer, "first " + "x " * 5000, "answer<|im_end|>")])
    shown = data_preview.render_terminal(rows, tokenizer, location, color=False)
    assert len(shown) < 5000
    assert "\nfirst x" in shown
    assert shown.endswith("«answer<|im_end|>»")
    assert f"[... {rows.lengths[0] - data_preview.TERMINAL_TOKENS:,} tokens ...]" in shown


def test_random_samples_depend_on_the_seed_and_are_unique(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = split([encoded(tokenizer, "q", "a")] * 50, np.repeat(np.arange(50), 3))
    assert (
        data_preview.random_samples(rows, 8, 0)
        == data_preview.random_samples(rows, 8, 0)
        != data_preview.random_samples(rows, 8, 1)
    )
    assert len(set(data_preview.random_samples(rows, 8, 0))) == 8
    assert data_preview.random_samples(split([encoded(tokenizer, "q", "a")]), 8, 0) == [0]


def test_contents_of_rows_are_escaped(tokenizer: PreTrainedTokenizerBase) -> None:
    findings = Findings()
    findings.add("roles", f"{EVIL}:1", f"turn is {EVIL}")
    found = parsed(
        data_preview.render_html(
            data_json(rows := split([encoded(tokenizer, EVIL, EVIL)]), {EVIL: 1}),
            {"train": rows, "validation": rows},
            {"train": lambda _: EVIL, "validation": lambda _: EVIL},
            tokenizer,
            max_length=512,
            packed=False,
            verdicts=quality_gates.judge(findings, 1, Gates()),
            limits=Gates(),
            name=EVIL,
            about=[("model", EVIL)],
        )
    )
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "link", "iframe", "object"}
    assert "".join(found.texts).count('<script>alert("x")</script>') >= 6


def test_the_page_needs_no_other_file(tokenizer: PreTrainedTokenizerBase) -> None:
    text = made_page(tokenizer, split([encoded(tokenizer, "q", "a")] * 9))
    found = parsed(text)
    assert not [values for _, values in found.tags if {"src", "href", "onload", "onclick"} & set(values)]
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"charset": "utf-8"}) in found.tags


def test_the_page_shows_tokens_with_ids_marks_and_locations(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, trained = encoded(tokenizer, "<|im_start|>user\nWhy  so?\n", "日本 \n<|im_end|>")
    text = made_page(tokenizer, split([(ids, trained)]))
    found = parsed(text)
    titles = [values["title"] for tag, values in found.tags if tag in ("i", "b") and "title" in values]
    assert " ".join(titles).split() == [str(token) for token in ids] * 2, "train and validation"
    assert text.count('<b title="1">&lt;|im_start|&gt;</b>') == 2
    assert re.search(r"<span class=t><i[^>]*>日</i>", text)
    assert "Why··so?⏎\n日本·⏎\n<|im_end|>" in "".join(found.texts)
    assert text.count("<s>·</s>") == 2 * 3 + 1, "once in the legend"
    assert f"<code>rows.jsonl:1</code> &middot; {len(ids)} tokens, {sum(trained)} trained" in text


def test_the_page_names_the_run_its_axes_and_the_gates(tokenizer: PreTrainedTokenizerBase) -> None:
    findings = Findings()
    findings.add_many("duplicates", ["rows.jsonl:7"], 1)
    verdicts = quality_gates.judge(findings, 9, Gates())
    text = made_page(tokenizer, split([encoded(tokenizer, "q", "a")] * 9), verdicts=verdicts)
    shown = " ".join(" ".join(parsed(text).texts).split())
    for words in (
        "Training data of tiny",
        "model llama8b",
        "chat template the tokenizer's own",
        "tokens of a sample, log scale",
    ):
        assert words in shown
    assert "the 12 gates that looked" in shown
    assert "duplicates are equal to an earlier row 1 20.0%" in shown
    assert "overlong are longer than data.max_length 0 20.0%" in shown


def test_cut_samples_have_a_note(tokenizer: PreTrainedTokenizerBase) -> None:
    long, short = encoded(tokenizer, "q " * 8, "a " * 20), encoded(tokenizer, "q", "a")
    size = len(long[0])
    rows = split([long, long, short, short])
    one_row = [data_preview._cut_notes(number, rows, lambda number: "rows.jsonl:1", size) for number in range(4)]
    assert one_row[0] == ["continued in the next sample"]
    assert one_row[1] == ["continues the previous sample", "continued in the next sample"]
    assert one_row[2] == ["continues the previous sample"]
    assert one_row[3] == []
    assert data_preview._cut_notes(0, rows, location, size) == ["as long as data.max_length: probably truncated"]
    assert "probably truncated" in made_page(tokenizer, rows, max_length=size)


def test_stops_come_before_warnings(tokenizer: PreTrainedTokenizerBase) -> None:
    findings = Findings()
    findings.add_many("duplicates", ["rows.jsonl:7"], 1)
    findings.add_many("untrained", [f"rows.jsonl:{number}" for number in range(10)], 90)
    text = made_page(
        tokenizer, split([encoded(tokenizer, "q", "a")]), verdicts=quality_gates.judge(findings, 100, Gates())
    )
    stop, warning = text.index("stops the run"), text.index(">warning<")
    assert stop < warning
    assert "<strong>90</strong> of 100 rows have no trained token: 90.00%, over <code>data.gates.untrained=0.05" in text
    assert "<strong>1</strong> of 100 rows are equal to an earlier row: 1.00%, within" in text
    assert "... and 87 more" in text
    assert "<code>rows.jsonl:7</code>" in text[warning:]


def test_tokens_by_set_count_repeated_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = encoded(tokenizer, "q", "a"), encoded(tokenizer, "q", "a " * 50)
    rows = split([short, short, long], np.array([0, 0, 1, 2]))
    found = charts.tokens_by_set(data_json(rows, {"short": 2, "long": 1}), rows)
    assert [one["name"] for one in found] == ["long", "short"]
    assert [one["tokens"] for one in found] == [len(long[0]), 3 * len(short[0])]
    assert [one["trained"] for one in found] == [sum(long[1]), 3 * sum(short[1])]
    assert sum(one["share"] for one in found) == pytest.approx(1)
    assert found[0]["width"] == 100


@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [([5], 5), ([1], 2), ([1, 1, 2], 2048), ([20, 30, 40], 64), (range(1, 9000), 8192), ([100] * 9, 131072)],
)
def test_every_sample_is_in_one_bar_within_the_chart(lengths: Sequence[int], max_length: int) -> None:
    lengths = np.minimum(np.asarray(lengths), max_length)
    chart = charts.length_histogram(lengths, max_length)
    assert sum(int(re.search(r": ([\d,]+) sample", say)[1].replace(",", "")) for *_, say in chart.bars) == len(lengths)
    assert all(
        left >= -1e-9 and left + width <= 100 + 1e-9 and 0 < height <= 100 for left, width, height, _ in chart.bars
    )
    assert all(-1e-9 <= at <= 100 + 1e-9 for at, _ in [*chart.x_ticks, *chart.y_ticks, chart.mark])
    assert len(chart.x_ticks) <= 8


def test_packed_rows_show_how_full_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = split([encoded(tokenizer, "q " * 20, "a " * 20)] * 10, pack_into=512)
    text = made_page(tokenizer, rows, packed=True)
    fill = rows.lengths.sum() / (len(rows) * 512)
    assert f"{len(rows)} rows per epoch, {fill:.1%} full" in text
    assert "train.micro_batch" not in text
    assert sum(chart[2] > 0 for chart in charts.fill_histogram(rows.lengths, 512).bars) >= 1


def test_padding_of_micro_batches() -> None:
    assert charts.padding(np.array([8, 8, 8, 8]), 0) == [(1, 0.0), (2, 0.0), (4, 0.0)]
    assert charts.padding(np.array([4, 16]), 0) == [(1, pytest.approx(1 / 6)), (2, pytest.approx(12 / 32))]


@pytest.mark.parametrize("text", ["'\"<&>  \t", "word ", "日本語😀", "\x00\x01"])
def test_the_page_stays_small_however_long_the_samples(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = np.resize(tokenizer.encode(text, add_special_tokens=False), 60_000).tolist()
    rows = split([(ids, [0, 1] * 30_000)] * 12)
    page_text = made_page(tokenizer, rows, max_length=60_000)
    assert len(page_text.encode()) < 1_000_000
    assert "tokens in between are not shown" in page_text
    parsed(page_text)


def test_empty_validation_shows(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = split([encoded(tokenizer, "q", "a")] * 3)
    none = batches.make_rows(rows.samples, np.zeros(0, dtype=np.int64))
    text = made_page(tokenizer, rows, validation=none)
    parsed(text)
    assert text.count("No samples.") == 1
    parsed(made_page(tokenizer, none, validation=none))
