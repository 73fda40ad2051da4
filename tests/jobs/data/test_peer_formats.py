"""Rows in the shapes that Axolotl, LLaMA-Factory, ms-swift, TRL and OpenAI document, and the turns that they must become."""

from typing import Any

import pytest

from jobs.data.formats import convert, detect_format
from jobs.tokenization.conversation import Sample, Turn

Q, A = Turn("user", "Hi"), Turn("assistant", "Hello!")
ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": ADD}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TEXT_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
LF_TOOLS = '[{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]'


def chat(*turns: Turn, **others: Any) -> Sample:
    return Sample(turns=turns, **others)


def say(speaker: str, text: object, **keys: object) -> dict[str, object]:
    return {"from": speaker, "value": text, **keys}


def message(role: str, content: object, **keys: object) -> dict[str, object]:
    return {"role": role, "content": content, **keys}


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str, Sample]] = {
    # name: (row, settings, format, sample)
    "Axolotl alpaca": (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        {},
        "alpaca",
        chat(Turn("user", "Add.\n1+1"), Turn("assistant", "2")),
    ),
    "Axolotl jeopardy": ({"question": "Hi", "category": "x", "answer": "Hello!"}, {}, "alpaca", chat(Q, A)),
    "Axolotl oasst": ({"INSTRUCTION": "Hi", "RESPONSE": "Hello!"}, {}, "alpaca", chat(Q, A)),
    "Axolotl gpteacher": ({"instruction": "Hi", "input": "", "response": "Hello!"}, {}, "alpaca", chat(Q, A)),
    "Axolotl metharme": ({"prompt": "Hi", "generation": "Hello!"}, {}, "alpaca", chat(Q, A)),
    "Axolotl load_open_orca": (
        {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello!"},
        {},
        "alpaca",
        chat(Turn("system", "Be kind."), Q, A),
    ),
    "Axolotl summarizetldr": (
        {"article": "Long.", "summary": "Short."},
        {"fields": {"instruction": "article", "output": "summary"}},
        "alpaca",
        chat(Turn("user", "Long."), Turn("assistant", "Short.")),
    ),
    "Axolotl context_qa": (
        {"article": "Tea is hot.", "question": "Is it?", "answer": "Yes."},
        {"fields": {"instruction": "{{ article }}\\n\\n{{ question }}", "output": "answer"}},
        "alpaca",
        chat(Turn("user", "Tea is hot.\n\nIs it?"), Turn("assistant", "Yes.")),
    ),
    "Axolotl load_camel_ai": (
        {"message_1": "Hi", "message_2": "Hello!"},
        {"fields": {"instruction": "message_1", "output": "message_2"}},
        "alpaca",
        chat(Q, A),
    ),
    "Axolotl explainchoice": (
        {"question": "Which?", "choices": ["a", "b"], "solution": "b", "explanation": "It is."},
        {"fields": {"instruction": "{{ question }} {{ choices | join(', ') }}", "output": "{{ solution }}: {{ explanation }}"}},
        "alpaca",
        chat(Turn("user", "Which? a, b"), Turn("assistant", "b: It is.")),
    ),
    "Axolotl pygmalion": (
        {"conversations": [{"role": "user", "value": "Hi"}, {"role": "bot", "value": "Hello!"}]},
        {},
        "sharegpt",
        chat(Q, A),
    ),
    "Axolotl chat_template": ({"messages": [USER, ANSWER]}, {}, "messages", chat(Q, A)),
    "Axolotl message_property_mappings, field_messages": (
        {"chat": [{"who": "human", "said": "Hi"}, {"who": "gpt", "said": "Hello!", "why": "Polite."}], "rules": "Be kind."},
        {"fields": {"messages": "chat", "system": "rules", "role": "who", "content": "said", "reasoning_content": "why"}},
        "messages",
        chat(Turn("system", "Be kind."), Q, Turn("assistant", "Hello!", reasoning_content="Polite.")),
    ),
    "Axolotl roles": (
        {"messages": [message("customer", "Hi"), message("agent", "Hello!")]},
        {"roles": {"customer": "user", "agent": "assistant"}},
        "messages",
        chat(Q, A),
    ),
    "Axolotl message_field_training": (
        {"messages": [USER, {**ANSWER, "learn": False}, USER, {**ANSWER, "learn": True}]},
        {"fields": {"train": "learn"}},
        "messages",
        chat(Q, Turn("assistant", "Hello!", train=False), Q, Turn("assistant", "Hello!", train=True)),
    ),
    "Axolotl train and train_detail": (
        {
            "conversations": [
                say("system", "Be kind.", train=False),
                say("human", "Hi", train=True),
                say(
                    "assistant",
                    "I am well, thanks!",
                    train_detail=[
                        {"begin_offset": 0, "end_offset": 3, "train": False},
                        {"begin_offset": 5, "end_offset": 8, "train": True},
                    ],
                ),
            ]
        },
        {},
        "sharegpt",
        chat(
            Turn("system", "Be kind.", train=False),
            Turn("user", "Hi", train=True),
            Turn(
                "assistant",
                "I am well, thanks!",
                train=True,
                train_detail=((0, 4, False), (4, 5, False), (5, 9, True), (9, 18, False)),
            ),
        ),
    ),
    "Axolotl split_thinking": (
        {"messages": [USER, message("assistant", "<think>\nPolite.\n</think>\n\nHello!")]},
        {"split_thinking": True},
        "messages",
        chat(Q, Turn("assistant", "Hello!", reasoning_content="Polite.")),
    ),
    "Axolotl tools with arguments as text": (
        {
            "tools": [{"type": "function", "function": {"name": "add", "parameters": '{"type": "object"}'}}],
            "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [TEXT_CALL]}, message("tool", "2", name="add")],
        },
        {},
        "messages",
        chat(
            Q,
            Turn("assistant", tool_calls=[TEXT_CALL]),
            Turn("tool", "2", name="add"),
            tools=[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        ),
    ),
    "Axolotl input_output": (
        {"segments": [{"label": False, "text": "<s>Hi\n"}, {"label": True, "text": "Hello!</s>"}]},
        {},
        "segments",
        Sample(parts=(("<s>Hi\n", False), ("Hello!</s>", True))),
    ),
    "Axolotl completion": ({"text": "A page."}, {}, "text", Sample(parts=(("A page.", True),))),
    "Axolotl pre-tokenized": (
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
        {},
        "tokenised",
        Sample(ids=(5, 6, 7), labels=(-100, 6, 7)),
    ),
    "LLaMA-Factory alpaca": (
        {"instruction": "Hi", "input": "", "output": "Hello!", "system": "Be kind.", "history": [["a", "b"]]},
        {},
        "alpaca",
        chat(Turn("system", "Be kind."), Turn("user", "a"), Turn("assistant", "b"), Q, A),
    ),
    "LLaMA-Factory pre-training": ({"text": "A page."}, {}, "text", Sample(parts=(("A page.", True),))),
    "LLaMA-Factory sharegpt with tools": (
        {
            "conversations": [
                say("human", "Hi"),
                say("function_call", '{"name": "add", "arguments": {"a": 1}}'),
                say("observation", '{"sum": 2}'),
                say("gpt", "Hello!"),
            ],
            "system": "Be kind.",
            "tools": LF_TOOLS,
        },
        {},
        "sharegpt",
        chat(
            Turn("system", "Be kind."),
            Q,
            Turn("assistant", tool_calls=[CALL], is_null=True),
            Turn("tool", '{"sum": 2}'),
            A,
            tools=TOOLS,
        ),
    ),
    "LLaMA-Factory openai": ({"messages": [message("system", "Be kind."), USER, ANSWER]}, {}, "messages",
                             chat(Turn("system", "Be kind."), Q, A)),
    "ms-swift messages": ({"messages": [message("system", "Be kind."), USER, ANSWER]}, {}, "messages",
                          chat(Turn("system", "Be kind."), Q, A)),
    "ms-swift pre-training": ({"messages": [ANSWER]}, {}, "messages", chat(A)),
    "ms-swift sharegpt": (
        {"system": "Be kind.", "conversation": [{"human": "Hi", "assistant": "Hello!"}, {"human": "a", "assistant": "b"}]},
        {},
        "messages",
        chat(Turn("system", "Be kind."), Q, A, Turn("user", "a"), Turn("assistant", "b")),
    ),
    "ms-swift query-response": (
        {"system": "Be kind.", "query": "Hi", "response": "Hello!", "history": [["a", "b"]]},
        {},
        "alpaca",
        chat(Turn("system", "Be kind."), Turn("user", "a"), Turn("assistant", "b"), Q, A),
    ),
    "ms-swift agent: parallel calls behind a text": (
        {
            "tools": LF_TOOLS,
            "messages": [
                USER,
                message("assistant", "One moment."),
                message("tool_call", '{"name": "add", "arguments": {"a": 1}}'),
                message("tool_call", '{"name": "add", "arguments": "{\\"a\\": 1}"}'),
                message("tool_response", '{"sum": 2}'),
                message("tool_response", '{"sum": 2}'),
                ANSWER,
            ],
        },
        {},
        "messages",
        chat(
            Q,
            Turn("assistant", "One moment.", tool_calls=[CALL, TEXT_CALL]),
            *[Turn("tool", '{"sum": 2}')] * 2,
            A,
            tools=TOOLS,
        ),
    ),
    "ms-swift loss and loss_scale": (
        {
            "messages": [
                USER, {**ANSWER, "loss": False}, USER, {**ANSWER, "loss_scale": 1.0}, USER, {**ANSWER, "loss_scale": 0.0}
            ]
        },
        {},
        "messages",
        chat(*(turn for train in (False, True, False) for turn in (Q, Turn("assistant", "Hello!", train=train)))),
    ),
    "TRL language modeling": ({"text": "The sky is blue."}, {}, "text", Sample(parts=(("The sky is blue.", True),))),
    "TRL conversational": ({"messages": [USER, ANSWER]}, {}, "messages", chat(Q, A)),
    "TRL prompt-completion": (
        {"prompt": "The sky is", "completion": " blue."},
        {},
        "prompt_completion",
        Sample(parts=(("The sky is", False), (" blue.", True))),
    ),
    "TRL conversational prompt-completion": (
        {"prompt": [USER], "completion": [ANSWER], "chat_template_kwargs": {"enable_thinking": False, "date": None}},
        {},
        "prompt_completion",
        chat(Q, A, template_kwargs={"enable_thinking": False}),
    ),
    "TRL tools": (
        {
            "tools": TOOLS,
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "name": "add", "content": "2"},
                ANSWER,
            ],
        },
        {},
        "messages",
        chat(Q, Turn("assistant", tool_calls=[CALL], is_null=True), Turn("tool", "2", name="add"), A, tools=TOOLS),
    ),
    "TRL harmony": (
        {
            "messages": [
                message("developer", "Be kind."),
                USER,
                {"role": "assistant", "thinking": "Polite.", "content": "Hello!"},
            ]
        },
        {},
        "messages",
        chat(Turn("developer", "Be kind."), Q, Turn("assistant", "Hello!", reasoning_content="Polite.")),
    ),
    "TRL tokenized with completion_mask": (
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
        {},
        "tokenised",
        Sample(ids=(5, 6, 7), labels=(-100, 6, 7)),
    ),
    "TRL packed": (
        {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2]},
        {},
        "tokenised",
        Sample(ids=(5, 6, 7, 8, 9), labels=(5, 6, 7, 8, 9), lengths=(2, 3)),
    ),
    "OpenAI chat": ({"messages": [message("system", "Be kind."), USER, ANSWER]}, {}, "messages",
                    chat(Turn("system", "Be kind."), Q, A)),
    "OpenAI weight": (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
        {},
        "messages",
        chat(Q, Turn("assistant", "Hello!", train=False), Q, Turn("assistant", "Hello!", train=True)),
    ),
    "OpenAI tools": (
        {
            "parallel_tool_calls": False,
            "tools": TOOLS,
            "messages": [
                USER,
                {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "call_1", **TEXT_CALL}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "2"},
                ANSWER,
            ],
        },
        {},
        "messages",
        chat(
            Q,
            Turn("assistant", tool_calls=[{"id": "call_1", **TEXT_CALL}], is_null=True),
            Turn("tool", "2", tool_call_id="call_1"),
            A,
            tools=TOOLS,
        ),
    ),
    "OpenAI functions": (
        {
            "functions": [ADD],
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                {"role": "function", "name": "add", "content": "2"},
                ANSWER,
            ],
        },
        {},
        "messages",
        chat(Q, Turn("assistant", tool_calls=[TEXT_CALL], is_null=True), Turn("tool", "2", name="add"), A, tools=TOOLS),
    ),
    "OpenAI refusal": (
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No, sorry."}]},
        {},
        "messages",
        chat(Q, Turn("assistant", "No, sorry.")),
    ),
    "OpenAI content parts": (
        {
            "messages": [
                message("developer", [{"type": "text", "text": "Be kind."}]),
                message("user", [{"type": "input_text", "text": "H"}, {"type": "text", "text": "i"}]),
                message("assistant", [{"type": "output_text", "text": "Hello!"}]),
            ]
        },
        {},
        "messages",
        chat(Turn("developer", "Be kind."), Q, A),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "settings", "name", "sample"), ROWS.values(), ids=ROWS)
def test_a_row_of_another_tool_becomes_the_turns_it_documents(row, settings, name, sample) -> None:
    fields = settings.get("fields")
    assert detect_format(row, fields)[0] == name
    assert convert(row, name, **settings) == sample


REFUSED = {
    "TRL preference": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "TRL implicit preference": {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
    "TRL unpaired preference": {"prompt": "The sky is", "completion": " blue.", "label": True},
    "TRL unpaired preference of 0 and 1": {"prompt": [USER], "completion": [ANSWER], "label": 0},
    "LLaMA-Factory preference": {"instruction": "Hi", "input": "", "chosen": "a", "rejected": "b"},
    "LLaMA-Factory sharegpt preference": {
        "conversations": [say("human", "Hi")],
        "chosen": say("gpt", "a"),
        "rejected": say("gpt", "b"),
    },
    "LLaMA-Factory KTO": {"instruction": "Hi", "output": "Hello!", "kto_tag": False},
    "ms-swift DPO": {"messages": [USER, ANSWER], "rejected_response": "No."},
    "ms-swift DPO of messages": {"messages": [USER, ANSWER], "rejected_messages": [USER, ANSWER]},
    "ms-swift KTO": {"messages": [USER, ANSWER], "label": False},
    "KTO beside alpaca": {"instruction": "Hi", "output": "Hello!", "label": 1.0},
    "OpenAI DPO": {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
    "UltraFeedback": {"prompt": "Hi", "messages": [USER, ANSWER], "score_chosen": 9.0, "score_rejected": 1.0},
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_preferences_of_another_tool_are_refused_by_name(row) -> None:
    with pytest.raises(ValueError, match="marks preference data"):
        detect_format(row)
