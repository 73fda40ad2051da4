"""Messages: their keys, thoughts, calls, content parts and training marks; what is read, and what is refused with which remedy."""

import json

import pytest

from jobs.data.formats import convert, detect_format
from jobs.tokenization.conversation import EmptyText, Sample, Turn

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
Q, A = Turn("user", "Hi"), Turn("assistant", "Hello!")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(*messages: object, **settings) -> tuple[Turn, ...]:
    return convert({"messages": list(messages)}, "messages", **settings).turns


def answer(**keys: object) -> dict[str, object]:
    return {**ANSWER, **keys}


def part(kind: str, **keys: object) -> dict[str, object]:
    return {"type": kind, **keys}


THOUGHT = Turn("assistant", "Hello!", reasoning_content="Polite.")
LAST = {
    "reasoning_content": (answer(reasoning_content="Polite."), THOUGHT),
    "reasoning": (answer(reasoning="Polite.", reasoning_content=None), THOUGHT),
    "thinking": (answer(thinking="Polite."), THOUGHT),
    "thought": (answer(thought="Polite."), THOUGHT),
    "thoughts": (answer(thoughts="Polite.", reasoning=""), THOUGHT),
    "the same thought twice": (answer(thinking="Polite.", reasoning_content="Polite."), THOUGHT),
    "a thought alone": (
        {"role": "assistant", "content": None, "thinking": "Polite."},
        Turn("assistant", is_null=True, reasoning_content="Polite."),
    ),
    "a part with a thought": (
        {"role": "assistant", "content": [part("thinking", thinking="Polite.", signature="x"), part("text", text="Hello!")]},
        THOUGHT,
    ),
    "a part of type reasoning": (
        {"role": "assistant", "content": [part("reasoning", text="Polite."), part("output_text", text="Hello!")]},
        THOUGHT,
    ),
    "Anthropic's call": (
        {
            "role": "assistant",
            "content": [part("text", text="Hello!"), part("tool_use", id="t1", name="add", input={"a": 1})],
        },
        Turn("assistant", "Hello!", tool_calls=[{"id": "t1", **CALL}]),
    ),
    "LangChain's call": (
        answer(tool_calls=[{"type": "tool_call", "id": "t1", "name": "add", "args": {"a": 1}}]),
        Turn("assistant", "Hello!", tool_calls=[{"id": "t1", **CALL}]),
    ),
    "arguments beside the function": (
        answer(tool_calls=[{"function": {"name": "add", "arguments": None}, "arguments": {"a": 1}}]),
        Turn("assistant", "Hello!", tool_calls=[CALL]),
    ),
    "null as JSON text": (answer(tool_calls="null"), A),
    "calls as JSON text": (
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        Turn("assistant", tool_calls=[CALL], is_null=True),
    ),
    "no calls": (answer(tool_calls=[], function_call=None), A),
    "an empty text beside calls": (
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        Turn("assistant", tool_calls=[CALL]),
    ),
    "a call without arguments": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": ""}}]},
        Turn("assistant", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}], is_null=True),
    ),
    "null keys, as Arrow fills them in": (answer(name=None, tool_calls=None, train=None), A),
    "further keys": (answer(id="m1", note=[], audio=None), Turn("assistant", "Hello!", extra={"id": "m1", "note": []})),
    "a number as the name": (answer(name=7), Turn("assistant", "Hello!", name="7")),
    "an empty answer that is not trained": (answer(content="", weight=0), Turn("assistant", "", train=False)),
}  # fmt: skip


@pytest.mark.parametrize(("message", "turn"), LAST.values(), ids=LAST)
def test_an_answer_is_read_with_its_keys(message, turn) -> None:
    assert read(USER, message, ANSWER) == (Q, turn, A)


def test_results_of_tools_in_a_users_message_are_turns_of_the_tool() -> None:
    call = {"role": "assistant", "content": [part("tool_use", id="t1", name="add", input={"a": 1})]}
    results = [
        part("tool_result", tool_use_id="t1", content=[part("text", text="2")]),
        part("tool_result", tool_use_id="t9", content="no", is_error=True),
    ]
    turns = read(USER, call, {"role": "user", "content": [*results, part("text", text="And?")]}, ANSWER)
    assert turns[2:] == (
        Turn("tool", "2", name="add", tool_call_id="t1"),
        Turn("tool", "no", tool_call_id="t9", extra={"is_error": True}),
        Turn("user", "And?"),
        A,
    )
    assert read(USER, call, {"role": "user", "content": results[:1]}, ANSWER)[2:] == (turns[2], A)


def test_tools_of_anthropic_get_the_names_that_templates_read() -> None:
    row = {
        "messages": [USER, ANSWER],
        "tools": [{"name": "add", "description": "x", "input_schema": {"type": "object"}}],
    }
    function = {"name": "add", "description": "x", "parameters": {"type": "object"}}
    assert convert(row, "messages").tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nWell.\n</think>\n\nHello!", ("Well.", "Hello!")),
        ("  <think>Well.</think>Hello!", ("Well.", "Hello!")),
        ("<think>\n\n</think>\n\nHello!", ("", "Hello!")),
        ("<reasoning>Well.</reasoning> Hello!", ("Well.", "Hello!")),
        (
            "<|begin_of_thought|>Well.<|end_of_thought|>\n<|begin_of_solution|>\nHello!\n<|end_of_solution|>\n",
            ("Well.", "Hello!"),
        ),
        ("<think>Well.</think>", ("Well.", "")),
        ("Hello! Tags: <think> and </think>.", (None, "Hello! Tags: <think> and </think>.")),
        ("a < b", (None, "a < b")),
    ],
)
def test_a_thought_in_tags_is_split_from_the_answer(text, expected) -> None:
    message = answer(content=text)
    turn = read(USER, message, split_thinking=True)[1]
    assert (turn.reasoning_content, turn.content) == expected
    assert read(USER, message)[1].content == text
    pair = {"instruction": "Hi", "output": text, "history": [["Hi", text]]}
    assert [t for t in convert(pair, "alpaca", split_thinking=True).turns if t.role == "assistant"] == [turn] * 2
    assert convert({"prompt": [USER], "response": text}, "prompt_completion", split_thinking=True).turns[1] == turn


WRONG = {
    "an unknown mark": (answer(masked=True), r"the key masked, which is not read: write `train` .* data.ignore=\[masked\]"),
    "two roles": ({"from": "gpt", **USER}, r"messages\[0\] has both role and from, .* set data.ignore=\[from\]"),
    "two contents": ({"value": "No", **USER}, r"has both content and value, which differ: .* data.ignore=\[value\]"),
    "two thoughts": (answer(thinking="a", reasoning="b"), r"has both reasoning and thinking, .* data.ignore=\[reasoning\]"),
    "a thought that is no text": (answer(thinking=True), r"thinking is true or false, not text: .* data.ignore=\[thinking\]"),
    "two kinds of calls": (
        answer(tool_calls=[CALL], function_call={"name": "add", "arguments": "{}"}),
        r"has both tool_calls and function_call: .* data.ignore=\[function_call\]",
    ),
    "marks that disagree": (answer(train=True, weight=0), r"has train and weight, which disagree"),
    "a fraction": (answer(loss_scale=0.5), r"loss_scale is 0.5: .* other weights are not supported"),
    "a word": (answer(train="yes"), r"train is 'yes': give true or false"),
    "a name that is a list": (answer(name=["a"]), r"name is \['a'\], not text: .* data.ignore=\[name\]"),
    "a picture": (answer(images=["a.png"]), r"messages\[0\].images is not text, .* data.ignore=\[images\]"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "error"), WRONG.values(), ids=WRONG)
def test_keys_that_cannot_all_be_right_are_refused_with_a_remedy_that_works(message, error) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        read(message, USER, ANSWER)
    if "data.ignore=[" in str(caught.value):
        ignored = str(caught.value).partition("data.ignore=[")[2].partition("]")[0]
        assert read(message, USER, ANSWER, ignore=[ignored])[-1] == A


REFUSED = {
    "arguments under an unknown key": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "add", "kwargs": {"a": 1}}]}],
        r"tool_calls\[0\] has no `arguments`, but a key kwargs, which nothing reads: rename it to `arguments`",
    ),
    "two arguments": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}, "args": {"a": 2}}]}],
        "has both arguments and args, which differ: remove one",
    ),
    "a thought as a turn": (
        [USER, {"role": "thinking", "content": "Well."}, ANSWER],
        "a thought is no turn of its own; give it as `reasoning_content` in the message of its answer",
    ),
    "a text as a message": (["Hi", "Hello!"], r"\[0\] is 'Hi', not an object .*: give {role, content} for each message"),
    "null content": ([{"role": "user", "content": None}, ANSWER], r"messages\[0\].content is null: give its text"),
    "no content": (
        [{"role": "user", "parts": [{"text": "Hi"}]}, ANSWER],
        r"content is null \(its keys are role, parts\): name the key in data.fields.content",
    ),
    "a null call": ([USER, {"role": "tool_call", "content": None}], r"\[1\].content is null: give the call as JSON"),
    "arguments that are no object": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "[1]"}}]}],
        r"arguments is a list, not an object",
    ),
    "arguments that are a number": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": 1}}]}],
        r"arguments is int, not an object",
    ),
    "NaN in arguments": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": float("nan")}}}]}],
        r"arguments cannot be written as JSON \(NaN",
    ),
    "NaN in arguments as text": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": NaN}'}}]}],
        r"arguments has NaN, which JSON does not have",
    ),
    "a custom tool": (
        [USER, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}, "name": "x"}]}],
        r"type is 'custom': only calls of functions",
    ),
    "a picture's part": ([{"role": "user", "content": [part("image_url")]}, ANSWER], r"\[0\].content\[0\] is of type image_url"),
    "a thought of the user": ([{"role": "user", "content": [part("thinking", thinking="x")]}, ANSWER], "is of type thinking"),
    "a thought behind its answer": (
        [USER, {"role": "assistant", "content": [part("text", text="a"), part("thinking", thinking="b")]}],
        r"content\[1\] of type thinking stands behind a part that chat templates write after it",
    ),
    "a text behind a call": (
        [USER, {"role": "assistant", "content": [part("tool_use", name="add", input={}), part("text", text="a")]}],
        r"content\[1\] of type text stands behind a part",
    ),
    "a text among parts": ([{"role": "user", "content": ["a", part("text", text="b")]}, ANSWER], r"content\[0\] is of type a text"),
    "content and refusal": ([USER, answer(refusal="No.")], r"both a content and a refusal: .* data.ignore=\[refusal\]"),
    "a pair with another key": ([{"human": "a", "assistant": "b", "tool": "c"}], r"the key tool, .* data.ignore=\[tool\]"),
    "offsets behind the end": (
        [USER, answer(train_detail=[{"begin_offset": 0, "end_offset": 6, "train": True}])],
        "train_detail ends at character 6, but the content has 6",
    ),
    "offsets that overlap": (
        [USER, answer(train_detail=[{"begin_offset": b, "end_offset": b + 2, "train": True} for b in (0, 2)])],
        "has parts that overlap",
    ),
    "offsets in parts": (
        [USER, {"role": "assistant", "content": [part("text", text="Hello!")],
                "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}],
        "needs a content that is one text",
    ),
    "calls in a row that disagree": (
        [USER, *({"role": "tool_call", "content": '{"name": "add"}', "loss": loss} for loss in (True, False))],
        "with another value of `train`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "error"), REFUSED.values(), ids=REFUSED)
def test_a_message_that_cannot_be_trained_on_is_refused(messages, error) -> None:
    with pytest.raises(ValueError, match=error):
        read(*messages)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<think>Well. Hello!", r"messages\[1\].content begins with <think> but has no </think>"),
        ("Well.</think>Hello!", r"messages\[1\].content has </think> without its begin"),
    ],
)
def test_half_a_thought_is_refused_where_thoughts_are_split(text, error) -> None:
    with pytest.raises(ValueError, match=error):
        read(USER, answer(content=text), split_thinking=True)
    assert read(USER, answer(content=text))[1].content == text


def test_two_thoughts_are_refused_where_thoughts_are_split() -> None:
    message = answer(content="<think>a</think>Hello!", reasoning_content="b")
    with pytest.raises(ValueError, match="begins with a thought and the message has another one"):
        read(USER, message, split_thinking=True)
    assert read(USER, message, split_thinking=True, ignore=["reasoning_content"])[1].reasoning_content == "a"


def test_a_mapping_to_no_role_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"data.roles maps user of messages\[0\].role to wizard, which is no role: .* tool, user"
    ):
        read(USER, ANSWER, roles={"user": "wizard"})


@pytest.mark.parametrize("column", ["train", "loss_mask", "weights"])
def test_marks_in_a_column_are_refused_and_the_remedy_works(column) -> None:
    row = {"messages": [USER, ANSWER], column: [0, 1]}
    with pytest.raises(ValueError, match=rf"the column {column} is a list, .* data.ignore=\[{column}\]"):
        convert(row, "messages")
    assert convert(row, "messages", ignore=[column]).turns == (Q, A)


EMPTY = {
    "a user's turn": {"messages": [{"role": "user", "content": ""}, ANSWER]},
    "one of several": {"messages": [USER, ANSWER, {"role": "user", "content": " \n"}, ANSWER]},
    "a user's turn without parts": {"messages": [{"role": "user", "content": []}, ANSWER]},
    "an answer": {"messages": [USER, answer(content=" ")]},
    "an answer with weight 1": {"messages": [USER, answer(content="", weight=1), USER, ANSWER]},
    "an answer with an empty thought": {"messages": [USER, answer(content="", thinking=" ")]},
    "a prompt": {"prompt": "", "completion": "Hello!"},
    "a prompt of turns": {"prompt": [{"role": "user", "content": ""}], "completion": "Hello!"},
    "a question of a pair": {"conversation": [{"human": "", "assistant": "b"}]},
    "an answer of a pair": {"conversation": [{"input": "a", "output": ""}]},
    "a question of the history": {"instruction": "a", "output": "b", "history": [["", "c"]]},
    "an answer of the history": {"instruction": "a", "output": "b", "history": [["c", " "]]},
}


@pytest.mark.parametrize("row", EMPTY.values(), ids=EMPTY)
def test_an_empty_question_or_answer_is_found(row) -> None:
    with pytest.raises(EmptyText):
        convert(row, detect_format(row)[0])


def test_the_remedy_for_empty_prompts_works() -> None:
    row = {"prompt": "", "completion": "Hello!"}
    with pytest.raises(EmptyText, match=r"set data.fields.text=completion"):
        convert(row, "prompt_completion")
    assert convert(row, "text", {"text": "completion"}).parts == (("Hello!", True),)


def test_an_empty_system_prompt_and_an_empty_result_are_no_questions() -> None:
    turns = read({"role": "system", "content": ""}, USER, ANSWER, {"role": "tool", "content": ""}, ANSWER)
    assert [turn.content for turn in turns] == ["", "Hi", "Hello!", "", "Hello!"]


def test_untrained_answers_of_a_prompt_may_be_empty() -> None:
    row = {"prompt": [USER, answer(content=""), USER], "completion": "Hello!"}
    assert convert(row, "prompt_completion").turns == (Q, Turn("assistant", "", train=False), Q, A)


def test_turns_of_one_speaker_in_a_row_stay_apart() -> None:
    assert read(USER, USER, ANSWER, ANSWER) == (Q, Q, A, A)
    assert read(ANSWER, USER, ANSWER) == (A, Q, A)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_may_be_json_text(column) -> None:
    row = {column: json.dumps([USER, ANSWER]), "tools": json.dumps([{"name": "add"}])}
    assert detect_format(row)[0] == "messages"
    assert convert(row, "messages") == Sample(turns=(Q, A), tools=[{"type": "function", "function": {"name": "add"}}])


def test_prompts_may_be_json_text_of_messages_but_any_other_text_stays() -> None:
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert convert(row, detect_format(row)[0]).turns == (Q, A)
    for text in ('[1, 2] is a list with "role"', '["role"]', "[role]", "[{'role': 'admin'}] is my list. Sort it."):
        assert convert({"prompt": text, "completion": text}, "prompt_completion").parts == ((text, False), (text, True))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": str([USER, ANSWER])},
        {"prompt": str([USER]), "completion": "x"},
        {"messages": [USER, ANSWER], "tools": str([CALL])},
    ],
)
def test_a_list_as_python_prints_it_is_refused_with_the_remedy(row) -> None:
    with pytest.raises(ValueError, match=r"as Python prints it, not JSON: write it with json.dumps\(...\)"):
        convert(row, detect_format(row)[0])


def test_documents_and_template_variables_are_read() -> None:
    row = {
        "messages": [USER, ANSWER],
        "documents": [{"title": "T", "text": "x"}, "y"],
        "chat_template_kwargs": '{"enable_thinking": false, "date": null}',
    }
    sample = convert(row, "messages")
    assert sample.documents == [{"title": "T", "text": "x"}, {"text": "y"}]
    assert sample.template_kwargs == {"enable_thinking": False}
    assert convert({"messages": [USER, ANSWER], "document": "y"}, "messages").documents == [{"text": "y"}]
    with pytest.raises(ValueError, match="chat_template_kwargs sets add_generation_prompt"):
        convert({**row, "chat_template_kwargs": {"add_generation_prompt": True}}, "messages")
    with pytest.raises(
        ValueError, match=r"documents\[0\] is int, not a text or an object: .* data.ignore=\[documents\]"
    ):
        convert({**row, "documents": [3]}, "messages")
    assert convert({**row, "documents": [3]}, "messages", ignore=["documents"]).documents is None


def test_developer_stays_developer_and_a_system_column_stands_before_it() -> None:
    developer = {"role": "developer", "content": "Be kind."}
    assert read(developer, USER, ANSWER)[0] == Turn("developer", "Be kind.")
    turns = convert({"messages": [developer, USER, ANSWER], "system": "Be brief."}, "messages").turns
    assert turns[:2] == (Turn("system", "Be brief."), Turn("developer", "Be kind."))
    assert read({"role": "boss", "content": "Be kind."}, ANSWER, roles={"boss": "developer"})[0].role == "developer"
