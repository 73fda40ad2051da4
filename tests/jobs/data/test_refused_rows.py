"""Rows of another kind: preferences, pictures and sound are refused by name; packed tokens are split at their borders."""

import pytest

from jobs.data.formats import convert, detect_format
from jobs.tokenization.conversation import EmptyText, Sample

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CHAT = {"messages": [USER, ANSWER]}
PAIR = {"instruction": "Hi", "output": "Hello!"}


def read(row: dict, **settings) -> Sample:
    return convert(row, detect_format(row, None, settings.get("ignore", ()))[0], **settings)


OTHER_KINDS = [
    *[
        {**CHAT, name: "a.png"}
        for name in ("image", "images", "image_path", "image_url", "img", "video", "videos", "video_path")
    ],
    *[
        {**CHAT, name: ["a.wav"]}
        for name in ("audio", "audios", "audio_path", "audio_file", "input_audio", "input_features")
    ],
    {**CHAT, "pixel_values": [[0.1]], "image_grid_thw": [[1, 2, 3]]},
    {**PAIR, "images": ["a.png"], "audio": "a.wav"},
    {**CHAT, "chosen": "a"},
    {**CHAT, "chosen": "a", "rejected": "b", "score_chosen": 1.0},
    {**CHAT, "rejected_response": "b"},
    {**CHAT, "label": True},
    {**CHAT, "label": 0},
    {"prompt": "a", "completion": "b", "label": "False"},
    {**PAIR, "label": 1.0},
    {**PAIR, "kto_tag": False},
    {"prompt": "a", "completion": "b", "label": False},
    {"text": "a", "chosen": "b"},
]


@pytest.mark.parametrize("row", OTHER_KINDS, ids=lambda row: "-".join(row))
def test_another_kind_is_refused_and_the_remedy_works(row) -> None:
    with pytest.raises(ValueError, match=r"the column \w+ (marks preference data|is not text)") as caught:
        read(row)
    ignored = []
    while "data.ignore=[" in str(caught.value):  # a row may be of two other kinds
        ignored += str(caught.value).partition("data.ignore=[")[2].partition("]")[0].split(",")
        try:
            assert read(row, ignore=ignored) == read(
                {name: value for name, value in row.items() if name not in ignored}
            )
            break
        except ValueError as error:
            caught.value.args = error.args
    assert ignored


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "images": [], "audio": None, "chosen": None, "rejected": "", "label": None},
        {**CHAT, "label": "positive"},
        {**PAIR, "images": "[]", "rejected": " "},
        {**PAIR, "label": 3},
        {"text": "A film.", "label": 1},
        {**CHAT, "video_id": "x7", "imagery": "x", "audience": "y", "unchosen": 1},
    ],
)
def test_columns_without_a_value_or_with_another_meaning_pass(row) -> None:
    assert read(row)


def test_good_answers_of_preferences_can_be_trained_on() -> None:
    row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
    with pytest.raises(ValueError, match=r"the column rejected marks preference data"):
        convert(row, "prompt_completion", {"completion": "chosen"})
    sample = convert(row, "prompt_completion", {"completion": "chosen"}, ignore=["rejected"])
    assert sample.parts == (("Hi", False), ("Hello!", True))


def question(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, ANSWER]}


@pytest.mark.parametrize(
    "text",
    [
        "<image>What is it?",
        "<image>\nWhat?",
        "What?\n<image>",
        "a\n <video> \nb",
        "<image><image>Both?",
        " <audio>",
        "What is it? <image>",
        "Are <image> <image> equal?",
        "<|image_1|>\nWhat?",
        "Picture 1: <img>a/b.png</img> What?",
    ],
)
def test_the_place_of_a_picture_is_refused(text) -> None:
    for row in (question(text), {"instruction": text, "output": "x"}, {"prompt": text, "completion": "x"}):
        with pytest.raises(ValueError, match=r"a question has <\S+> where a picture or sound belongs"):
            read(row)


@pytest.mark.parametrize(
    "text",
    [
        "`<image>` at the beginning",
        "What does <image> mean in SVG?",
        "Fix this:\n<video>\n<source src='a.mp4'>\n</video>",
        "<image>\n<url>a</url>\n</image>",
        "<images>",
        "<img src='a.png'>",
    ],
)
def test_tags_that_are_meant_as_text_pass(text) -> None:
    assert read(question(text)).turns[0].content == text
    assert read({"messages": [USER, {"role": "assistant", "content": text}]}).turns[1].content == text


def test_rows_that_are_single_messages_are_refused_and_the_remedy_works() -> None:
    row = {"message_id": "a", "parent_id": "b", "role": "prompter", "text": "Hi"}
    with pytest.raises(ValueError, match=r"each row is one message of a chat: join .* set data.ignore=\[role\]"):
        read(row)
    assert read(row, ignore=["role"]).parts == (("Hi", True),)
    assert read({"text": "A text.", "role": "nurse"})
    assert read({**CHAT, "role": "user"})


@pytest.mark.parametrize("row", [PAIR, {"prompt": "Hi", "completion": "Hello!"}], ids="-".join)
def test_a_thought_in_a_column_of_its_own_is_refused_and_the_remedies_work(row) -> None:
    row = {**row, "reasoning": "Be polite."}
    answer = "output" if "output" in row else "completion"
    with pytest.raises(
        ValueError, match=r"the column reasoning seems to hold the thought .* data.ignore=\[reasoning\]"
    ) as caught:
        read(row)
    assert read(row, ignore=["reasoning"]) == read({**row, "reasoning": "on"})
    template = str(caught.value).partition(f"data.fields.{answer}='\"")[2].partition("\"'")[0]
    fields = {answer: template}
    sample = convert(row, detect_format(row, fields)[0], fields, split_thinking=True)
    if sample.turns:
        assert (sample.turns[1].reasoning_content, sample.turns[1].content) == ("Be polite.", "Hello!")
    else:
        assert sample.parts[1] == ("<think>Be polite.</think>Hello!", True)


def test_options_of_a_question_are_refused_and_the_remedies_work() -> None:
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    with pytest.raises(ValueError, match=r"the column choices holds options .* data.ignore=\[choices\]") as caught:
        read(row)
    assert read(row, ignore=["choices"]).turns[0].content == "Which?"
    template = str(caught.value).partition("data.fields.instruction='\"")[2].partition("\"'")[0]
    assert convert(row, "alpaca", {"instruction": template}).turns[0].content == 'Which? ["a", "b"]'
    fields = {"instruction": template, "output": "{{ choices[answer] }}"}
    assert convert(row, "alpaca", fields).turns[1].content == "b"


RIVALS = {
    "two questions": ({"instruction": "Answer.", "question": "Who?", "output": "I."}, "instruction", "question"),
    "two inputs": ({"instruction": "Answer.", "input": "a", "context": "b", "output": "I."}, "input", "context"),
    "two answers": ({"question": "Who?", "response": "It is I.", "answer": "I."}, "output", "answer"),
    "two answers to messages": ({"prompt": [USER], "output": "It is I.", "answer": "I."}, "output", "answer"),
}


@pytest.mark.parametrize(("row", "column", "other"), RIVALS.values(), ids=RIVALS)
def test_two_columns_for_one_text_are_refused_and_the_remedies_work(row, column, other) -> None:
    with pytest.raises(
        ValueError, match=rf"and {other} are both .* data.ignore=\[{other}\], .* data.fields.{column}={other}"
    ):
        read(row)
    without = {name: value for name, value in row.items() if name != other}
    assert read(row, ignore=[other]) == read(without)
    fields = {column: other}
    sample = convert(row, detect_format(row, fields)[0], fields)
    assert any(row[other] in turn.content for turn in sample.turns)


@pytest.mark.parametrize("copy", [{"prompt": "Below is an instruction: Hi"}, {"response": "Hello!"}, {"question": ""}])
def test_a_copy_of_a_column_is_no_other_text(copy) -> None:
    assert read({**PAIR, **copy}) == read(PAIR)


IDS = [5, 6, 7, 8, 9]
PACKED = {
    "position ids that begin again": ({"position_ids": [0, 1, 0, 1, 2]}, IDS, (2, 3)),
    "position ids that count on": ({"position_ids": [0, 1, 2, 3, 4]}, IDS, ()),
    "position ids that begin later": ({"position_ids": [3, 4, 5, 6, 7]}, IDS, ()),
    "position ids with padding": (
        {"position_ids": [1, 1, 0, 1, 2], "attention_mask": [0, 0, 1, 1, 1]}, IDS[2:], ()
    ),
    "lengths": ({"seq_lengths": [2, 3]}, IDS, (2, 3)),
    "one length": ({"seq_lengths": [5]}, IDS, ()),
    "lengths with padding": ({"seq_lengths": [2, 2, 1], "attention_mask": [1, 1, 1, 1, 0]}, IDS[:4], (2, 2)),
    "a mask with numbers": ({"attention_mask": [1, 1, 2, 2, 0]}, IDS[:4], (2, 2)),
    "segments": ({"segment_ids": [0, 0, 0, 1, 1]}, IDS, (3, 2)),
    "all of them": (
        {"seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2], "attention_mask": [1, 1, 2, 2, 2], "segment_ids": [7, 7, 8, 8, 8]},
        IDS,
        (2, 3),
    ),
    "null columns": ({"seq_lengths": None, "position_ids": None, "labels": None}, IDS, ()),
    "JSON text, as in CSV": ({"input_ids": "[5, 6, 7, 8, 9]", "labels": "[5, 6, 7, 8, 9]", "seq_lengths": "[2, 3]"}, IDS, (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "ids", "lengths"), PACKED.values(), ids=PACKED)
def test_packed_tokens_are_split_at_their_borders(columns, ids, lengths) -> None:
    assert read({"input_ids": IDS, **columns}) == Sample(ids=tuple(ids), labels=tuple(ids), lengths=lengths)


WRONG = {
    "ids in two dimensions": (
        {"input_ids": [IDS, IDS]},
        r"input_ids\[0\] is .*, not a token id: give one row for each list",
    ),
    "positions in two dimensions": ({"position_ids": [IDS] * 5}, "position_ids holds lists, not numbers"),
    "a mask in two dimensions": ({"attention_mask": [IDS] * 5}, "attention_mask holds lists, not numbers"),
    "positions that jump": (
        {"position_ids": [0, 1, 2, 4, 5]},
        r"position_ids\[3\] is 4 after 2: .* data.ignore=\[position_ids\]",
    ),
    "positions of another length": ({"position_ids": [0]}, "input_ids has 5 tokens, position_ids 1"),
    "lengths of another sum": ({"seq_lengths": [2, 2]}, r"seq_lengths is \[2, 2\], but input_ids has 5 tokens"),
    "borders that disagree": (
        {"seq_lengths": [1, 4], "position_ids": [0, 1, 0, 1, 2]},
        r"disagree \(position_ids \[2, 3\], seq_lengths \[1, 4\]\)",
    ),
    "segments that mix": (
        {"segment_ids": [1, 2, 1, 2, 2]},
        "segment_ids has the same number for tokens that are not in a row",
    ),
    "segments with padding": (
        {"segment_ids": [1, 1, 2, 0, 0]},
        "segment_ids has 0 after other numbers: .* attention_mask",
    ),
    "cumulative lengths": (
        {"cu_seqlens": [0, 2, 5]},
        r"column cu_seqlens .* give their lengths as seq_lengths, or set data.ignore",
    ),
    "a negative mask": ({"attention_mask": [1, 1, 1, 1, -1]}, "attention_mask has -1"),
    "a mask of fractions": ({"completion_mask": [0, 0.5, 1, 1, 1]}, "completion_mask has 0.5, not a whole number"),
    "a mask of other numbers": ({"completion_mask": [0, 2, 1, 1, 1]}, "completion_mask has other values than 0 and 1"),
    "a mask with null": ({"attention_mask": [1, 1, 1, 1, None]}, "attention_mask has null, not a whole number"),
    "positions that are texts": ({"position_ids": list("01234")}, "position_ids has '0', not a whole number"),
    "segments that are objects": ({"segment_ids": [{}] * 5}, "segment_ids has {}, not a whole number"),
    "a shifted label at the beginning": ({"labels": [6, 7, 8, 9, -100]}, "a label is 6 where the token is 5"),
}


@pytest.mark.parametrize(("columns", "message"), WRONG.values(), ids=WRONG)
def test_tokens_whose_borders_are_unclear_are_refused(columns, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read({"input_ids": IDS, **columns})
    if "data.ignore=[" in str(caught.value):
        ignored = str(caught.value).partition("data.ignore=[")[2].partition("]")[0]
        assert read({"input_ids": IDS, **columns}, ignore=[ignored]).ids == tuple(IDS)


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "loss_mask"])
def test_a_mask_of_trained_tokens_is_kept(name) -> None:
    assert read({"input_ids": IDS, name: [0, 0, 1, 1, 0]}).labels == (-100, -100, 7, 8, -100)
    assert read({"input_ids": IDS, "labels": [-100, 6, 7, 8, 9], name: [1, 0, 1, 1, 1]}).labels == (-100, -100, 7, 8, 9)


def test_only_padding_is_empty() -> None:
    with pytest.raises(EmptyText):
        read({"input_ids": IDS, "attention_mask": [0] * 5})
