"""Every format: rows as in the documentation of LLaMA-Factory, Axolotl, TRL and OpenAI, and the samples they must become."""

import pytest

from jobs.data.formats import CONVERTERS, convert, detect_format
from jobs.tokenization.conversation import Sample, Turn

HI, HELLO = Turn("user", "Hi"), Turn("assistant", "Hello!")
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
ADD = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}]
TEXT_CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
"""The same call with its arguments as text: they stay as the row has them."""
TOOL_TURNS = (
    Turn("user", "1+1?"),
    Turn("assistant", tool_calls=CALL, is_null=True),
    Turn("tool", '{"sum": 2}'),
    Turn("assistant", "2."),
)
WEATHER = {"id": "call_0001", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def chat(*turns: Turn, tools: list | None = None) -> Sample:
    return Sample(turns=turns, tools=tools)


def messages_of(*pairs: tuple[str, object], keys: tuple[str, str] = ("role", "content")) -> list[dict]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


SHAREGPT = ("from", "value")

ROWS = {
    "alpaca": ("alpaca", {"instruction": "Hi", "output": "Hello!"}, chat(HI, HELLO)),
    "alpaca with an empty input": ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello!"}, chat(HI, HELLO)),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "Sum up.", "input": "Long.", "output": "Short."},
        chat(Turn("user", "Sum up.\nLong."), Turn("assistant", "Short.")),
    ),
    "alpaca with system and history": (
        "alpaca",
        {
            "instruction": "Hi",
            "input": None,
            "output": "Hello!",
            "system": "Be kind.",
            "history": [["a", "b"], ["c", "d"]],
        },
        chat(
            Turn("system", "Be kind."),
            *(Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")),
            *(HI, HELLO),
        ),
    ),
    "alpaca beside its rendered text": (
        "alpaca",
        {"instruction": "Hi", "output": "Hello!", "text": "###"},
        chat(HI, HELLO),
    ),
    "axolotl gpteacher": ("alpaca", {"instruction": "Hi", "input": "", "response": "Hello!"}, chat(HI, HELLO)),
    "axolotl oasst": ("alpaca", {"INSTRUCTION": "Hi", "RESPONSE": "Hello!"}, chat(HI, HELLO)),
    "axolotl jeopardy": ("alpaca", {"question": "Hi", "category": "x", "answer": "Hello!"}, chat(HI, HELLO)),
    "axolotl metharme": ("alpaca", {"prompt": "Hi", "generation": "Hello!"}, chat(HI, HELLO)),
    "axolotl open orca": (
        "alpaca",
        {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello!"},
        chat(Turn("system", "Be kind."), HI, HELLO),
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": messages_of(("human", "Hi"), ("gpt", "Hello!"), keys=SHAREGPT)},
        chat(HI, HELLO),
    ),
    "sharegpt with system": (
        "sharegpt",
        {"system": "Be kind.", "conversations": messages_of(("human", "Hi"), ("gpt", "Hello!"), keys=SHAREGPT)},
        chat(Turn("system", "Be kind."), HI, HELLO),
    ),
    "sharegpt whose system prompt is given twice": (
        "sharegpt",
        {
            "system": "yes ",
            "conversations": messages_of(("system", "yes"), ("human", "Hi"), ("gpt", "Hello!"), keys=SHAREGPT),
        },
        chat(Turn("system", "yes"), HI, HELLO),
    ),
    "sharegpt with tools, as LLaMA-Factory's glaive": (
        "sharegpt",
        {
            "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
            "conversations": messages_of(
                ("human", "1+1?"),
                ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
                ("observation", '{"sum": 2}'),
                ("gpt", "2."),
                keys=SHAREGPT,
            ),
        },
        chat(*TOOL_TURNS, tools=TOOLS),
    ),
    "sharegpt with two calls at once": (
        "sharegpt",
        {
            "tools": "",
            "conversations": messages_of(
                ("human", "Hi"),
                (
                    "function_call",
                    '[{"name": "add", "arguments": "{\\"a\\": 1}"}, {"name": "add", "arguments": {"a": 1}}]',
                ),
                ("tool", "2"),
                keys=SHAREGPT,
            ),
        },
        chat(HI, Turn("assistant", tool_calls=[*TEXT_CALL, *CALL], is_null=True), Turn("tool", "2")),
    ),
    "axolotl's sharegpt with train": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Hi", "train": False},
                {"from": "assistant", "value": "Hello!", "train": True},
                {"from": "gpt", "value": "Hello!", "weight": 0},
                {"from": "gpt", "value": "Hello!", "weight": None},
            ]
        },
        chat(
            Turn("user", "Hi", train=False),
            Turn("assistant", "Hello!", train=True),
            Turn("assistant", "Hello!", train=False),
            HELLO,
        ),
    ),
    "conversations with role and content": (
        "messages",
        {"conversations": messages_of(("user", "Hi"), ("assistant", "Hello!"))},
        chat(HI, HELLO),
    ),
    "pygmalion": (
        "sharegpt",
        {"conversations": messages_of(("user", "Hi"), ("bot", "Hello!"), keys=("role", "value"))},
        chat(HI, HELLO),
    ),
    "messages": ("messages", {"messages": messages_of(("user", "Hi"), ("assistant", "Hello!"))}, chat(HI, HELLO)),
    "messages beside a prompt": (
        "messages",
        {"prompt": "Hi", "prompt_id": "7", "messages": messages_of(("user", "Hi"), ("assistant", "Hello!"))},
        chat(HI, HELLO),
    ),
    "messages of parts": (
        "messages",
        {
            "messages": messages_of(
                ("developer", "Be kind."),
                ("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
                ("assistant", [{"type": "text", "text": "Hello!"}]),
            )
        },
        chat(Turn("developer", "Be kind."), HI, HELLO),
    ),
    "messages with OpenAI's tools": (
        "messages",
        {
            "tools": TOOLS,
            "parallel_tool_calls": False,
            "messages": [
                {"role": "user", "content": "1+1?", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [WEATHER], "weight": 0},
                {"role": "tool", "tool_call_id": "call_0001", "name": "add", "content": '{"sum": 2}'},
                {"role": "assistant", "content": "2.", "weight": 1},
            ],
        },
        chat(
            TOOL_TURNS[0],
            Turn("assistant", tool_calls=[{"id": "call_0001", **TEXT_CALL[0]}], train=False, is_null=True),
            Turn("tool", '{"sum": 2}', name="add", tool_call_id="call_0001"),
            Turn("assistant", "2.", train=True),
            tools=TOOLS,
        ),
    ),
    "messages with OpenAI's older functions": (
        "messages",
        {
            "functions": [ADD],
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                {"role": "function", "name": "add", "content": '{"sum": 2}'},
                {"role": "assistant", "content": "2."},
            ],
        },
        chat(
            TOOL_TURNS[0],
            Turn("assistant", tool_calls=TEXT_CALL, is_null=True),
            Turn("tool", '{"sum": 2}', name="add"),
            TOOL_TURNS[3],
            tools=TOOLS,
        ),
    ),
    "messages with TRL's tools and reasoning": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": {"sum": 2}},
                {"role": "assistant", "thinking": "Easy.", "content": "2."},
            ]
        },
        chat(*TOOL_TURNS[:3], Turn("assistant", "2.", reasoning_content="Easy.")),
    ),
    "prompt and completion": (
        "prompt_completion",
        {"prompt": "The sky is", "completion": " blue."},
        Sample(parts=(("The sky is", False), (" blue.", True))),
    ),
    "prompt and completion of turns": (
        "prompt_completion",
        {
            "prompt": messages_of(("user", "a"), ("assistant", "b"), ("user", "Hi")),
            "completion": messages_of(("assistant", "Hello!")),
            "tools": [ADD],
        },
        chat(Turn("user", "a"), Turn("assistant", "b", train=False), HI, HELLO, tools=TOOLS),
    ),
    "prompt of turns, completion of text": (
        "prompt_completion",
        {"prompt": messages_of(("user", "Hi")), "completion": "Hello!"},
        chat(HI, HELLO),
    ),
    "prompt of text, completion of turns": (
        "prompt_completion",
        {"prompt": "Hi", "completion": messages_of(("assistant", "Hello!"))},
        chat(HI, HELLO),
    ),
    "axolotl's segments": (
        "segments",
        {"segments": [{"label": False, "text": "<s>Hi\n"}, {"label": True, "text": "Hello!</s>"}]},
        Sample(parts=(("<s>Hi\n", False), ("Hello!</s>", True))),
    ),
    "text": ("text", {"text": "A page.\n", "url": "x"}, Sample(parts=(("A page.\n", True),))),
    "tokenised": ("tokenised", {"input_ids": [5, 6]}, Sample(ids=(5, 6), labels=(5, 6))),
    "tokenised with labels and padding": (
        "tokenised",
        {"input_ids": [5, 6, 0], "labels": [-100, 6, -100], "attention_mask": [1, 1, 0]},
        Sample(ids=(5, 6), labels=(-100, 6)),
    ),
}


@pytest.mark.parametrize(("name", "row", "sample"), ROWS.values(), ids=ROWS)
def test_a_documented_row_is_detected_and_converted(name, row, sample) -> None:
    detected, reason = detect_format(row)
    assert detected == name
    assert reason.startswith("i")
    assert convert(row, name) == sample


def test_every_format_has_a_row() -> None:
    assert {name for name, _, _ in ROWS.values()} == set(CONVERTERS)


MAPPED = {
    "columns": (
        {"q": "Hi", "a": "Hello!", "text": "no"},
        {"instruction": "q", "output": "a"},
        "alpaca",
        chat(HI, HELLO),
    ),
    "Jinja": (
        {"title": "Sky", "body": "It is blue."},
        {"text": "# {{ title }}\n{{ body }}\n"},
        "text",
        Sample(parts=(("# Sky\nIt is blue.\n", True),)),
    ),
    "Jinja with a loop": (
        {"q": "Which?", "choices": ["a", "b"], "right": 1},
        {"prompt": "{{ q }}{% for c in choices %} {{ c }}{% endfor %}\n", "completion": "{{ choices[right] }}"},
        "prompt_completion",
        Sample(parts=(("Which? a b\n", False), ("b", True))),
    ),
    "keys of a message": (
        {"dialog": messages_of(("customer", "Hi"), ("agent", "Hello!"), keys=("who", "said")), "about": "Be kind."},
        {"messages": "dialog", "system": "about", "role": "who", "content": "said"},
        "messages",
        chat(Turn("system", "Be kind."), HI, HELLO),
    ),
}


@pytest.mark.parametrize(("row", "fields", "name", "sample"), MAPPED.values(), ids=MAPPED)
def test_other_columns_can_be_mapped(row, fields, name, sample) -> None:
    assert detect_format(row, fields)[0] == name
    assert convert(row, name, fields, {"customer": "user", "agent": "assistant"}) == sample


def turns(*messages: dict) -> dict:
    return {"messages": list(messages)}


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
WRONG = {
    "unknown role": (
        turns({"role": "narrator", "content": "x"}),
        r"messages\[0\].role is 'narrator', an unknown role: map",
    ),
    "no role": (turns({"content": "x"}), r"messages\[0\] has no role among its keys \['content'\]"),
    "null content": (
        turns(USER, {"role": "assistant", "content": None}),
        r"messages\[1\].content is null: give its text",
    ),
    "empty answer": (
        turns(USER, {"role": "assistant", "content": " "}),
        r"messages\[1\].content is empty: .* drop the row",
    ),
    "no answer": (turns(USER), "no turn is the assistant's"),
    "no turns": (turns(), "messages is empty"),
    "not an object": ({"messages": ["Hi"]}, r"messages\[0\] is 'Hi', not an object"),
    "an image": (
        turns({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
        r"messages\[0\].content\[0\] is of type image_url: only text",
    ),
    "half a weight": (turns(USER, ANSWER | {"weight": 0.5}), r"messages\[1\].weight is 0.5"),
    "parts of a turn": (
        turns(USER, ANSWER | {"train_detail": [{}]}),
        r"messages\[1\].train_detail\[0\] is {}: give a list",
    ),
    "a call without a name": (
        turns(USER, ANSWER | {"tool_calls": [{}]}),
        r"messages\[1\].tool_calls\[0\] is not a tool call",
    ),
    "a call that is not JSON": (
        turns(USER, {"role": "function_call", "content": "add(1)"}),
        r"messages\[1\].content is not valid JSON",
    ),
    "two system prompts": (
        {"system": "no", "messages": [{"role": "system", "content": "yes"}, USER, ANSWER]},
        r"system and the first message are two different system prompts: .* data.ignore=\[system\]",
    ),
    "a special token as a variable of the template": (
        turns(USER, ANSWER) | {"chat_template_kwargs": {"bos_token": "<x>"}},
        "chat_template_kwargs sets bos_token",
    ),
    "tools that are not JSON": (turns(USER, ANSWER) | {"tools": "add"}, "tools is not valid JSON"),
    "tools whose function has no name": (
        turns(USER, ANSWER) | {"tools": [{"function": {}}]},
        r"tools\[0\] is not a function",
    ),
    "tools without names": (turns(USER, ANSWER) | {"tools": [{"a": 1}]}, r"tools\[0\] is not a function schema"),
    "empty output": ({"instruction": "Hi", "output": ""}, "output is empty"),
    "empty question": ({"instruction": "", "input": "", "output": "x"}, "both empty"),
    "half a history": ({"instruction": "Hi", "output": "x", "history": [["a"]]}, r"history\[0\] is not a pair"),
    "empty completion": ({"prompt": "Hi", "completion": ""}, "completion is empty"),
    "empty text": ({"text": " \n"}, "text is empty"),
    "unequal lengths": ({"input_ids": [1, 2], "labels": [1]}, "input_ids has 2 tokens, labels 1"),
    "half a character": ({"text": "Hi \ud83d"}, "text holds half a character"),
    "half a character in a turn": (turns(USER, ANSWER | {"content": "\ude00"}), "messages holds half a character"),
    "half a character in tools": (turns(USER, ANSWER) | {"tools": [ADD | {"a": "\ud83d"}]}, "tools holds half a"),
    "a part without text": (
        turns(USER, ANSWER | {"content": [{"type": "text"}]}),
        r"messages\[1\].content\[0\].text is null, not text: give its text",
    ),
    "a part with null": (turns(USER, ANSWER | {"content": [{"type": "text", "text": None}]}), r"\[0\].text is null"),
    "a part with a number": (turns(USER, ANSWER | {"content": [{"type": "text", "text": 5}]}), r"\[0\].text is int"),
    "tools nested too deeply": (turns(USER, ANSWER) | {"tools": "[" * 200_000}, r"tools is not valid JSON \(nested"),
    "tools with too long a number": (turns(USER, ANSWER) | {"tools": "1" * 5000}, r"tools is not valid JSON \(Exceeds"),
    "a history of no pairs": ({"instruction": "Hi", "output": "x", "history": 5}, "history is 5, not a list"),
    "token ids of no list": ({"input_ids": 7}, "input_ids is 7, not a list: give a list of token ids"),
    "labels of no list": ({"input_ids": [7], "labels": 3}, "labels is 3, not a list"),
    "a mask of no list": ({"input_ids": [7], "attention_mask": 1}, "attention_mask is 1, not a list"),
    **{
        f"a token that is {token!r}": ({"input_ids": [1, token]}, rf"input_ids\[1\] is {message}, not a token id")
        for token, message in [
            (2**40, 2**40),
            (None, "null"),
            ([5], r"\[5\]"),
            (6.5, "6.5"),
            ("6", "'6'"),
            (True, True),
        ]
    },
    "a label that is null": ({"input_ids": [1], "labels": [None]}, "a label is null where the token is 1"),
    "shifted labels": ({"input_ids": [1, 2], "labels": [2, -100]}, "a label is 2 where the token is 1"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_a_row_that_cannot_be_trained_on_is_refused_with_the_reason(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        convert(row, detect_format(row)[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi", "chosen": "a", "rejected": "b"}, "column chosen marks preference data"),
        ({"instruction": "Hi", "output": "a", "kto_tag": False}, "column kto_tag marks preference data"),
        ({"prompt": "Hi", "completion": "a", "label": False}, "column label marks preference data"),
        ({"instruction": "Hi", "output": "a", "images": ["x.png"]}, "column images is not text"),
        ({"a": 1, "b": 2}, "no known format has the columns a, b: set data.format"),
        ({"prompt": "The sky is"}, "no known format"),
        ({"text": b"a"}, "text is bytes, not a text"),
        ({"text": ["a"], "id": 1}, "text is a list, not a text"),
    ],
)
def test_unsupported_data_is_refused(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format(row)


@pytest.mark.parametrize(
    ("row", "format", "fields", "message"),
    [
        (
            {"text": "x"},
            "alpaca",
            None,
            "alpaca needs a column instruction or .*, and this row has text: all rows of a file must",
        ),
        ({"instruction": "x", "output": None}, "alpaca", None, "output is null: give its text"),
        ({"text": "x"}, "messages", None, "messages needs a column messages or"),
        ({"text": "x"}, "csv", None, "format 'csv' is unknown: use one of alpaca"),
        ({"segments": 5}, "segments", None, "segments is 5, not a list: give a list of objects with `text`"),
        ({"a": 1, "b": 0}, "text", {"text": "{{ a / b }}"}, "text cannot be rendered: division by zero; columns: a, b"),
        ({"a": "x"}, "text", {"text": "b"}, "text is null, because the row has no value in b: give its text"),
        ({"a": "x"}, "text", {"text": "{{ b }}"}, "text is null, because the row has no value in {{ b }}: give"),
    ],
)
def test_a_row_of_another_format_is_refused_with_the_reason(row, format, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        convert(row, format, fields)
