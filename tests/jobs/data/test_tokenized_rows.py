"""What becomes of a block of rows: packed rows are split and stay together, settings reach the rows, unused columns are told."""

import json
import logging

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.choices import Format, Overlong
from conf.errors import DataError
from conf.schema_model import DataSet
from jobs.data import tokenized_set
from jobs.data.sources import Block
from jobs.data.tokenize import BlockTokenizer, TokenizeSettings
from jobs.tokenization.chat_settings import DEFAULTS, ChatSettings
from tests.jobs.ranks import CLONE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")


def tokenize(tokenizer, *rows, max_length=64, **settings):
    defaults = {"format": "tokenised", "fields": {}, "roles": {}, "chat": DEFAULTS, "overlong": Overlong.truncate}
    block = Block("rows.jsonl:", 1, lines=b"\n".join(json.dumps(row).encode() for row in rows))
    return BlockTokenizer(TokenizeSettings(tokenizer, max_length=max_length, **{**defaults, **settings}))(block)


def samples(block):
    return [part.tolist() for part in np.split(block.tokens, np.cumsum(block.lengths)[:-1])]


def test_the_samples_of_a_packed_row_are_split_and_held_out_together(tokenizer) -> None:
    end = tokenizer.eos_token_id
    packed = {"input_ids": [5, 6, end, 7, 8, 9, end], "position_ids": [0, 1, 2, 0, 1, 2, 3]}
    block = tokenize(tokenizer, packed, {"input_ids": [5, 6, end]})
    assert samples(block) == [[5, 6, end], [7, 8, 9, end], [5, 6, end]]
    assert block.labels.tolist() == [2, 3, 2]
    assert block.row_numbers.tolist() == [1, 1, 2]
    assert block.origins[0] == block.origins[1] == block.hashes[0]
    assert not block.findings.counts
    alone = tokenize(tokenizer, {"input_ids": [5, 6, end]}, {"input_ids": [7, 8, 9, end]})
    assert alone.hashes.tolist() == block.hashes.tolist()[:2]


def test_each_sample_of_a_packed_row_is_checked(tokenizer) -> None:
    end = tokenizer.eos_token_id
    row = {
        "input_ids": [5, 6, 7, 8, end, 9, 9, 9],
        "seq_lengths": [3, 2, 3],
        "labels": [5, 6, 7, 8, end, -100, -100, -100],
    }
    block = tokenize(tokenizer, row)
    assert samples(block) == [[5, 6, 7], [8, end]]
    assert block.findings.counts == {"endless": 1}
    block = tokenize(tokenizer, row, max_length=2)
    assert samples(block) == [[5, 6], [8, end]]
    assert block.findings.counts == {"overlong": 2}
    assert tokenize(tokenizer, {**row, "labels": [-100] * 8}).findings.counts == {"untrained": 1}


def test_ignored_names_and_split_thoughts_reach_the_rows(tokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "label": True}
    refused = tokenize(tokenizer, row, format="messages")
    assert refused.findings.counts == {"unusable": 1}
    assert tokenize(tokenizer, row, format="messages", ignore=("label",)).lengths.tolist() != []
    half = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Hello!"}]}
    assert tokenize(tokenizer, half, format="messages").lengths.tolist() != []
    assert tokenize(tokenizer, half, format="messages", split_thinking=True).findings.counts == {"unusable": 1}


def test_empty_questions_count_in_the_gate_empty(tokenizer) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]} for text in ("", "a")
    ]
    findings = tokenize(tokenizer, *rows, format="messages").findings
    assert findings.counts["empty"] == 1
    assert [row for reason in findings.reasons["empty"].values() for row in reason.rows] == [
        ("rows.jsonl:1", "messages[0].content is empty: there is no question; drop the row")
    ]


def test_answers_need_no_end_if_no_end_is_trained(tokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    block = tokenize(tokenizer, row, format="messages", chat=ChatSettings(train_on_end="none"))
    assert not block.findings.counts
    assert not block.trained[block.tokens == tokenizer.eos_token_id].any()


def test_columns_that_nothing_reads_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a:1", {"id": 1, "text": "a"}), ("a:2", {"id": 2, "text": "a", "source": "x"}), ("a:3", {"txet": "a"})]
    with caplog.at_level(logging.INFO):
        tokenized_set._log_unused_columns("pages", rows, "text", DataSet("a"))
        tokenized_set._log_unused_columns("pages", rows[:1], "text", DataSet("a", ignore=["id"]))
    assert caplog.messages == ["columns   pages: not used: id, source, txet"]


@pytest.mark.parametrize("format", [Format.auto, Format.alpaca])
def test_a_mapped_column_that_no_row_has_is_refused_whatever_the_format(format) -> None:
    rows = [("a:1", {"q": "a", "output": "b"})]
    dataset = DataSet("a", format=format, fields={"instruction": "q", "system": "sytsem"})
    with pytest.raises(
        DataError, match=r"data.fields: there is no column sytsem for data.fields.system in the first row"
    ):
        tokenized_set._format_name("pages", rows, dataset)
    dataset.fields["system"] = "{{ 'Be kind.' }}"
    assert tokenized_set._format_name("pages", rows, dataset) == "alpaca"
