"""jobs/tokenization/turn_spans.py: under templates of every shape, exactly what the model writes is trained on."""

import time
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.tokenization.chat_settings import ChatSettings
from jobs.tokenization.chat_template import end_tokens
from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.encoder import Encoder
from jobs.tokenization.reference import chat_messages, encode, ends_with_end_token
from tests.jobs.ranks import CLONE

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN3 = """{% set n = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.asked = loop.index0 %}
{% endif %}{% endfor %}{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}
{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '') %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > n.asked %}<think>
{{ thought.strip('\n') }}
</think>

{% endif %}{{ said }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Writes thoughts only behind the last question."""
QWEN36 = QWEN3.removesuffix("{% endif %}") + "<think>\n{% endif %}"
"""The generation prompt also opens the thought."""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>
{{- m.content }}{% elif m.role == 'tool' %}<｜tool｜>{{ m.content }}{% else %}<｜Assistant｜>
{%- if loop.last and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{% for call in m.tool_calls or [] %}<｜call｜>{{ call.function.name }}
{{ call.function.arguments | tojson }}{% endfor %}{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""
GPT_OSS = """{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and (loop.last or m.tool_calls) %}
<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}{% if m.tool_calls %}
<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}
{% elif m.role == 'tool' %}
<|start|>functions.{{ messages[loop.index0 - 1].tool_calls[0].function.name }} to=assistant<|message|>{{ m.content }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
GLM = """[gMASK]<sop>{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>
{% if m.role == 'assistant' %}<think>{{ m.reasoning_content if loop.last else '' }}</think>
{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key><arg_value>{{ value }}</arg_value>{% endfor %}
</tool_call>{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
GEMMA4 = """{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if loop.last and m.reasoning_content %}<|channel>thought
{{ m.reasoning_content }}
<channel|>{% endif %}{% for call in m.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}
{{- call.function.arguments | tojson }}<tool_call|>{% endfor %}{{ m.content | trim }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
NEMOTRON = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>{% if loop.last and m.reasoning_content %}
{{ m.reasoning_content }}
{% endif %}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
PHI3 = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}"""
LLAMA = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}{% for m in messages %}
{% if m.role == 'user' %}[INST] {% if loop.last or loop.index0 + 2 == messages | length %}
{{- system + '\n\n' if system else '' }}{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>
{%- endif %}{% endfor %}"""
"""The system's text moves on into the last question."""
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "qwen3.6": (QWEN36, "<|im_end|>"),
    "r1": (R1, "<｜end▁of▁sentence｜>"),
    "gpt-oss": (GPT_OSS, "<|return|>"),
    "glm": (GLM, "<|endoftext|>"),
    "gemma4": (GEMMA4, "<eos>"),
    "nemotron": (NEMOTRON, "<|im_end|>"),
    "phi3": (PHI3, "<|endoftext|>"),
    "llama": (LLAMA, "<|end_of_text|>"),
    "mistral": (MISTRAL, "</s>"),
}
"""(template, end-of-text token). The shapes of these families, not their text."""
SPECIAL = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool｜>",
        "<｜call｜>",
        "<｜end▁of▁sentence｜>",
    ),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>", "<|endoftext|>", "<sop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    *("<|tool_call>", "<tool_call|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<eos>", "</s>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "[INST]", "[/INST]"),
]


def tokenizer_for(family):
    tokenizer = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    template, eos = TEMPLATES[family]
    special = [*SPECIAL, *(["[gMASK]"] if family == "glm" else [])]
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos, "additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {family: tokenizer_for(family) for family in TEMPLATES}


def trained(sample, tokenizer, mask="assistant", *, raw=None, **settings: Any):
    """The text of each unbroken run of trained tokens. Checks the ids, and that both ways give the same.

    raw: the messages for `apply_chat_template`, if they are not those of the sample.
    """
    settings = ChatSettings(mask, **settings)
    ids, marks = encode(sample, tokenizer, settings=settings)
    variables = {**settings.template_kwargs, **(sample.template_kwargs or {})}
    messages = chat_messages(sample) if raw is None else raw
    variables |= {"tools": sample.tools, "documents": sample.documents}
    if any(message.get("content", "") is None for message in messages):  # `apply_chat_template` would leave them out
        variables |= tokenizer.special_tokens_map
        text = render_jinja_template([messages], chat_template=tokenizer.chat_template, **variables)[0][0]
        expected = tokenizer.encode(text, add_special_tokens=False)
    else:
        expected = tokenizer.apply_chat_template(messages, return_dict=True, **variables)["input_ids"]
    last = sample.turns[-1]
    if settings.end_of_turn and ids != expected:
        expected += tokenizer.encode(settings.end_of_turn[0], add_special_tokens=False)
    elif "[gMASK]" in tokenizer.get_vocab() and last.role == "assistant" and ids != expected:
        end = "<|observation|>" if last.tool_calls else "<|user|>"
        expected += tokenizer.encode(end, add_special_tokens=False)
    assert ids == expected
    [fast] = Encoder(tokenizer, settings=settings).encode_fast([sample])
    assert fast is not None, "the fast way must not need the slow one"
    assert (fast[0].tolist(), fast[1].tolist()) == (ids, marks)
    runs = groupby(zip(ids, marks, strict=True), key=lambda item: item[1])
    return [tokenizer.decode([token for token, _ in run]) for yes, run in runs if yes]


def error(sample, tokenizer, mask="assistant", **settings: Any):
    """The error of both ways, which must be the same."""
    with pytest.raises(ValueError) as slow:
        encode(sample, tokenizer, settings=ChatSettings(mask, **settings))
    with pytest.raises(ValueError) as fast:
        Encoder(tokenizer, settings=ChatSettings(mask, **settings))(sample)
    assert str(fast.value) == str(slow.value)
    return str(slow.value)


def called(name="add", **arguments: Any):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


SYSTEM = Turn("system", "Be kind.")
HI, BYE = Turn("user", "Hi"), Turn("user", "Bye")
CHAT = (HI, Turn("assistant", "Hello!"), BYE, Turn("assistant", "So long."))
THOUGHTS = (
    HI,
    Turn("assistant", "Hello!", reasoning_content="Greet."),
    BYE,
    Turn("assistant", "So long.", reasoning_content="Part."),
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = (
    Turn("user", "1+1?"),
    Turn("assistant", tool_calls=called(a="one")),
    Turn("tool", "2"),
    Turn("assistant", "Two."),
)
CALL = '{"name": "add", "arguments": {"a": "one"}}'

CHATS = {
    "chatml": ["Hello!<|im_end|>", "So long.<|im_end|>"],
    "qwen3": ["Hello!<|im_end|>", "<think>\n\n</think>\n\nSo long.<|im_end|>"],
    "qwen3.6": ["Hello!<|im_end|>", "\n</think>\n\nSo long.<|im_end|>"],
    "r1": ["Hello!<｜end▁of▁sentence｜>", "So long.<｜end▁of▁sentence｜>"],
    "gpt-oss": ["<|channel|>final<|message|>Hello!<|end|>", "<|channel|>final<|message|>So long.<|return|>"],
    "glm": ["\n<think></think>\nHello!<|user|>", "\n<think></think>\nSo long.<|user|>"],
    "gemma4": ["Hello!<turn|>", "So long.<turn|>"],
    "nemotron": ["</think>Hello!<|im_end|>", "</think>So long.<|im_end|>"],
    "phi3": ["Hello!<|end|>", "So long.<|end|>"],
    "llama": ["Hello!<|eot_id|>", "So long.<|eot_id|>"],
    "mistral": [" Hello!</s>", " So long.</s>"],
}


@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("family", CHATS)
def test_answers_are_trained_with_their_end(
    family: str, system: bool, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer, head = tokenizers[family], (SYSTEM,) if system else ()
    first, last = CHATS[family]
    assert trained(Sample(turns=(*head, *CHAT)), tokenizer) == [first, last]
    assert trained(Sample(turns=(*head, *CHAT)), tokenizer, "last") == [last]
    assert trained(Sample(turns=(*head, HI, CHAT[3])), tokenizer) == [last]
    assert ends_with_end_token(*encode(Sample(turns=CHAT), tokenizer), tokenizer)


@pytest.mark.parametrize("family", CHATS)
def test_a_turns_flag_wins(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer, (first, last) = tokenizers[family], CHATS[family]
    untaught = Sample(turns=(HI, replace(CHAT[1], train=False), *CHAT[2:]))
    taught = Sample(turns=(HI, replace(CHAT[1], train=True), *CHAT[2:]))
    assert trained(untaught, tokenizer) == [last]
    assert trained(taught, tokenizer, "last") == [first, last]
    before, after = trained(untaught, tokenizer, "all")
    whole = tokenizer.apply_chat_template(chat_messages(untaught), tokenize=False)
    assert before + first + after == whole + ("<|user|>" if family == "glm" else "")


THOUGHT_TEXTS = {
    "qwen3": ["Hello!<|im_end|>", "<think>\nPart.\n</think>\n\nSo long.<|im_end|>"],
    "qwen3.6": ["Hello!<|im_end|>", "Part.\n</think>\n\nSo long.<|im_end|>"],
    "r1": ["Hello!<｜end▁of▁sentence｜>", "Part.\n</think>\n\nSo long.<｜end▁of▁sentence｜>"],
    "gpt-oss": [
        "<|channel|>final<|message|>Hello!<|end|>",
        "<|channel|>analysis<|message|>Part.<|end|><|start|>assistant<|channel|>final<|message|>So long.<|return|>",
    ],
    "glm": ["\n<think></think>\nHello!<|user|>", "\n<think>Part.</think>\nSo long.<|user|>"],
    "gemma4": ["Hello!<turn|>", "<|channel>thought\nPart.\n<channel|>So long.<turn|>"],
    "nemotron": ["</think>Hello!<|im_end|>", "Part.\n</think>So long.<|im_end|>"],
}


@pytest.mark.parametrize("family", THOUGHT_TEXTS)
def test_thoughts_of_earlier_turns_may_be_dropped(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers[family]
    assert trained(Sample(turns=THOUGHTS), tokenizer) == THOUGHT_TEXTS[family]
    assert trained(Sample(turns=(HI, THOUGHTS[3])), tokenizer) == THOUGHT_TEXTS[family][1:]


@pytest.mark.parametrize("family", ["qwen3", "qwen3.6"])
def test_thoughts_in_the_content(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    inside = [Turn("assistant", f"<think>\n{t.reasoning_content}\n</think>\n\n{t.content}") for t in THOUGHTS[1::2]]
    sample = Sample(turns=(HI, inside[0], BYE, inside[1]))
    assert trained(sample, tokenizers[family]) == THOUGHT_TEXTS[family]


CALL_TEXTS = {
    "qwen3": [
        f"<think>\n\n</think>\n\n<tool_call>{CALL}</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nTwo.<|im_end|>",
    ],
    "r1": ['<｜call｜>add\n{"a": "one"}<｜end▁of▁sentence｜>', "Two.<｜end▁of▁sentence｜>"],
    "gpt-oss": [
        ' to=functions.add<|channel|>commentary json<|message|>{"a": "one"}<|call|>',
        "<|channel|>final<|message|>Two.<|return|>",
    ],
    "glm": [
        "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key><arg_value>one</arg_value></tool_call><|observation|>",
        "\n<think></think>\nTwo.<|user|>",
    ],
    "gemma4": ['<|tool_call>call:add{"a": "one"}<tool_call|><turn|>', "Two.<turn|>"],
    "nemotron": [f"</think><tool_call>{CALL}</tool_call><|im_end|>", "</think>Two.<|im_end|>"],
    "llama": ['{"name": "add", "parameters": {"a": "one"}}<|eot_id|>', "Two.<|eot_id|>"],
}


@pytest.mark.parametrize("family", CALL_TEXTS)
def test_calls_without_content_are_trained(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert trained(Sample(turns=CALLS, tools=TOOLS), tokenizers[family]) == CALL_TEXTS[family]


@pytest.mark.parametrize("value", [7, None, {}, [1.5, True]], ids=repr)
def test_arguments_that_are_no_texts_are_trained_whole(
    value: object, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    turns = (CALLS[0], Turn("assistant", tool_calls=called(a=value)), *CALLS[2:])
    first = trained(Sample(turns=turns), tokenizers["llama"])[0]
    assert first.startswith('{"name": "add", "parameters": {"a": ')
    assert first.endswith("}}<|eot_id|>")


@pytest.mark.parametrize("family", ["chatml", "qwen3", "gemma4", "llama", "phi3", "gpt-oss"])
def test_the_first_turn_may_be_the_assistants(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    first, last = CHATS[family]
    sample = Sample(turns=(CHAT[1], BYE, CHAT[3]))
    assert trained(sample, tokenizers[family]) == [first, last]


def test_a_first_turn_without_a_generation_prompt_is_refused(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert "the first turn is the assistant's" in error(Sample(turns=CHAT[1:]), tokenizers["mistral"])


@pytest.mark.parametrize("family", CHATS)
def test_blanks_and_tokens_in_texts(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Questions that end with blanks, are empty, or have the tokens of the template in them."""
    tokenizer, (first, last) = tokenizers[family], CHATS[family]
    for question in (
        "Hi \n",
        "",
        "Hi <think>",
        *([] if "qwen" in family else ["Say </think>"]),
        f"Say {first} <|im_start|>assistant\n",
    ):
        sample = Sample(turns=(Turn("user", question), CHAT[1], Turn("user", question + " "), CHAT[3]))
        assert trained(sample, tokenizer) == [first, last], question
    repeats = Sample(turns=(Turn("user", "Hello!"), CHAT[1], Turn("user", "Hello!"), CHAT[3]))
    assert trained(repeats, tokenizer) == [first, last]


@pytest.mark.parametrize("content", ["<think>\nPart.", "<think>\n", "<think>\n\n"], ids=repr)
def test_content_may_begin_as_the_generation_prompt_ends(
    content: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    sample = Sample(turns=(HI, Turn("assistant", content), BYE, Turn("assistant", content)))
    answer = content.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"
    assert trained(sample, tokenizers["r1"]) == [answer, answer]


def test_consecutive_answers_and_results(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    turns = (*CALLS[:3], Turn("tool", "3"), CALLS[3], *CHAT[:2], Turn("assistant", "Again."))
    texts = [*CALL_TEXTS["llama"], "Hello!<|eot_id|>", "Again.<|eot_id|>"]
    assert trained(Sample(turns=turns), tokenizers["llama"]) == texts


def test_private_characters_leave_the_way_of_prefixes(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    sample = Sample(turns=(Turn("user", "Hi \U000f0000"), *CHAT[1:]))
    assert trained(sample, tokenizers["llama"]) == CHATS["llama"]
    assert "rewrites earlier turns" in error(sample, tokenizers["qwen3"])


def test_without_an_end_token_the_turn_is_what_the_template_adds() -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    assert trained(Sample(turns=CHAT), tokenizer) == ["Hello!\n", "So long.\n"]
    assert not ends_with_end_token(*encode(Sample(turns=CHAT), tokenizer), tokenizer)


def test_the_next_roles_tokens_end_turns_of_glm_only(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert {"<|user|>", "<|observation|>"} <= set(end_tokens(tokenizers["glm"]))
    assert not {"<|user|>", "<|observation|>"} & set(end_tokens(tokenizers["phi3"]))


MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
UNWRITTEN = {
    "a call": (
        (HI, Turn("assistant", "Wait.", tool_calls=called(a="one")), *CHAT[2:]),
        "tool_calls[0].name of messages[1]: use a template that knows tool calls, or drop the calls",
    ),
    "an untrained call": (
        (HI, Turn("assistant", "Wait.", tool_calls=called(a="one"), train=False), *CHAT[2:]),
        "tool_calls[0].name of messages[1]: use a template that knows tool calls, or drop the calls",
    ),
    "thoughts": (
        (*CHAT[:3], THOUGHTS[3]),
        "reasoning_content of messages[3]: use a template that knows thoughts, or drop them",
    ),
}


@pytest.mark.parametrize("mask", ["assistant", "last", "all"])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["", "generation marks"])
@pytest.mark.parametrize(("turns", "says"), UNWRITTEN.values(), ids=UNWRITTEN)
def test_texts_that_the_template_does_not_write_are_refused(
    turns: tuple[Turn, ...], says: str, template: str, mask: str
) -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = template
    assert error(Sample(turns=turns), tokenizer, mask) == f"the chat template does not write {says}"
    assert trained(Sample(turns=(HI, THOUGHTS[1], *CHAT[2:])), tokenizer, "last") == ["So long.<|im_end|>"]


def test_content_beside_a_call(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Refused where the template never writes it, but not where it writes it in the last turn only."""
    beside = Sample(turns=(CALLS[0], replace(CALLS[1], content="Let me add."), *CALLS[2:]))
    assert error(beside, tokenizers["llama"]) == (
        "the chat template does not write content of messages[1]: use a template that knows such texts, or drop the text"
    )
    tokenizer = tokenizer_for("llama")
    tokenizer.chat_template = LLAMA.replace('{"name"', '{% if loop.last %}{{ m.content }}{% endif %}{"name"')
    assert trained(beside, tokenizer) == CALL_TEXTS["llama"]


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("text", ["Hello!<|im_end|>", "Write <|im_end|> last."])
def test_an_answer_with_the_token_that_ends_it_is_refused(
    key: str, text: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    turn = Turn("assistant", **{"content": "Hello!", key: text})
    sample = Sample((Turn("user", "Say <|im_end|>."), turn))
    says = error(sample, tokenizers["qwen3"])
    assert says.startswith(f"messages[1].{key} has <|im_end|>, the token that ends a turn")
    assert trained(replace(sample, turns=(sample.turns[0], replace(turn, train=False))), tokenizers["qwen3"]) == []


def test_a_text_behind_the_results_of_its_calls_is_refused() -> None:
    template = """{% for m in messages %}{% if m.role == 'user' %}<q>{{ m.content }}{% elif m.tool_calls %}
<a>{{ m.tool_calls[0].function | tojson }}{% if not loop.last %}{{ loop.nextitem.content }}{% endif %}{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<a>{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}
<a>{% endif %}"""
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = template
    call = Turn("assistant", "Wait.", called(a=1))
    turns = (Turn("user", "1+1?"), call, Turn("tool", "two"), Turn("assistant", "Two."))
    assert "does not write messages[1] in one piece, " in error(Sample(turns), tokenizer)
    without = (turns[0], replace(call, content=""), *turns[2:])
    assert trained(Sample(without), tokenizer)[-1] == "Two.<|im_end|>"


def test_a_system_turn_that_is_not_written_is_refused() -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert "does not write content of messages[0]" in error(Sample(turns=(SYSTEM, *CHAT)), tokenizer)


def test_arguments_may_be_written_with_escapes(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    turns = (CALLS[0], Turn("assistant", tool_calls=called(a='two\n"lines"')), *CALLS[2:])
    first = trained(Sample(turns=turns), tokenizers["llama"])[0]
    assert first == '{"name": "add", "parameters": {"a": "two\\n\\"lines\\""}}<|eot_id|>'
    trained(Sample(turns=turns), tokenizers["llama"], "all")


def test_many_turns_take_linear_time(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    for family in ("chatml", "qwen3.6", "gpt-oss"):
        encoder = Encoder(tokenizers[family])
        begin = time.process_time()
        [found] = encoder.encode_fast([Sample(turns=CHAT * 200)])
        assert time.process_time() - begin < 1
        assert found is not None


TOOL_CHAT = (SYSTEM, *CALLS)
ENDS = {
    ("assistant",): {
        "turn": ["{call}<|im_end|>", "Two.<|im_end|>"],
        "all": ["<|im_end|>", "<|im_end|>", "{call}<|im_end|>", "<|im_end|>", "Two.<|im_end|>"],
        "last": ["{call}", "Two.<|im_end|>"],
        "none": ["{call}", "Two."],
    },
    ("assistant", "tool"): {
        "turn": ["{call}<|im_end|>", "2<|im_end|>", "Two.<|im_end|>"],
        "none": ["{call}", "2", "Two."],
    },
    ("user", "system"): {"turn": ["Be kind.<|im_end|>", "1+1?<|im_end|>"]},
}


@pytest.mark.parametrize(
    ("roles", "ends", "expected"),
    [(roles, ends, texts) for roles, by_ends in ENDS.items() for ends, texts in by_ends.items()],
)
def test_roles_and_ends(
    roles: tuple[str, ...], ends: str, expected: list[str], tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    """Axolotl's roles_to_train and train_on_eos, with and without generation marks in the template."""
    call = f"<tool_call>{CALL}</tool_call>"
    plain = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}",
    )
    body = plain[plain.index("{{ m.content }}") : plain.index("<|im_end|>")]
    marks = "{% if m.role == 'assistant' %}{% generation %}" + body + "<|im_end|>{% endgeneration %}{% else %}"
    for template in (plain, plain.replace(body + "<|im_end|>", marks + body + "<|im_end|>{% endif %}")):
        tokenizer = tokenizer_for("chatml")
        tokenizer.chat_template = template
        texts = trained(Sample(turns=TOOL_CHAT), tokenizer, train_on=roles, train_on_end=ends)
        assert texts == [text.replace("{call}", call) for text in expected]


@pytest.mark.parametrize("family", CHATS)
def test_ends_of_every_family(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer, (first, last) = tokenizers[family], CHATS[family]
    stems = [
        max((text.removesuffix(end) for end in end_tokens(tokenizer)), key=lambda t: -len(t)) for text in (first, last)
    ]
    assert trained(Sample(turns=CHAT), tokenizer, train_on_end="none") == stems
    assert trained(Sample(turns=CHAT), tokenizer, train_on_end="last") == [stems[0], last]
    assert trained(Sample(turns=CHAT), tokenizer, "last", train_on_end="turn") == [last]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama"])
def test_parts_of_a_turn(family: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Axolotl's train_detail: only the named characters, and the end of the turn."""
    tokenizer, end = tokenizers[family], CHATS[family][0].removeprefix("Hello!")
    turn = Turn("assistant", "Hello, old friend!", train_detail=((0, 5, True), (5, 10, False), (10, 18, True)))
    assert trained(Sample(turns=(HI, turn, *CHAT[2:])), tokenizer) == ["Hello", " friend!" + end, CHATS[family][1]]
    assert trained(Sample(turns=(HI, turn)), tokenizer, train_on_end="none") == ["Hello", " friend!"]
    whole = trained(Sample(turns=(HI, turn)), tokenizer, "all")
    assert whole[-2].endswith("Hello")
    assert whole[-1].startswith(" friend!")


def test_end_of_turn_names_the_token(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """For templates whose end tokens nobody knows, and for those that write none behind the last answer."""
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<tool_call>")
    assert not ends_with_end_token(*encode(Sample(turns=CHAT), tokenizer), tokenizer)
    assert trained(Sample(turns=CHAT), tokenizer, end_of_turn=("<tool_call>",)) == [
        "Hello!<tool_call>",
        "So long.<tool_call>",
    ]
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "{% if not loop.last %}<tool_call>{% endif %}")
    assert trained(Sample(turns=CHAT), tokenizer, end_of_turn=("<tool_call>",)) == [
        "Hello!<tool_call>",
        "So long.<tool_call>",
    ]
    assert end_tokens(tokenizer, ("<tool_call>",)) == tuple({tokenizer.eos_token, "<tool_call>"})


@pytest.mark.parametrize("answer", ["Hello!", "  Hello!\n", " ", "\n x"], ids=repr)
def test_blanks_that_a_token_takes_are_not_the_tokens(answer: str) -> None:
    """Phi-4's <|im_sep|> takes the blanks behind it, and some end tokens those before."""
    tokenizer = tokenizer_for("chatml")
    greedy = [AddedToken("<sep>", rstrip=True, special=True), AddedToken("<stop>", lstrip=True, special=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": greedy}, replace_extra_special_tokens=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}<sep>{{ m.content }}<stop>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant<sep>{% endif %}"
    )
    sample = Sample(turns=(Turn("user", "Hi "), Turn("assistant", answer)) * 2)
    assert trained(sample, tokenizer, end_of_turn=("<stop>",)) == [f"{answer.strip()}<stop>"] * 2


def test_a_call_without_an_end_token_ends_where_the_results_begin() -> None:
    """As in DeepSeek R1's template: the result follows the call at once."""
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% if not m.tool_calls %}{{ m.content }}<|im_end|>"
        "{% endif %}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert trained(Sample(turns=CALLS), tokenizer) == [f"<tool_call>{CALL}</tool_call>", "Two.<|im_end|>"]
