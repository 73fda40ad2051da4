"""jobs/tokenization/template_inputs.py: a chat reaches its template in the form that the template reads, or is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from jobs.tokenization.chat_settings import ChatSettings
from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.encoder import Encoder
from tests.jobs.tokenization.test_turn_spans import CHAT, CHATML, HI, SYSTEM, error, tokenizer_for, trained

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
RESULT = (Turn("tool", "2"), Turn("assistant", "Two."))


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = template
    return tokenizer


def writing(call: str) -> PreTrainedTokenizerBase:
    """A tokenizer whose template writes the content and then this for each call."""
    calls = "{% for c in m.tool_calls or [] %}<tool_call>" + call + "</tool_call>{% endfor %}"
    return with_template(CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls))


def asked(arguments: Any, **keys: Any) -> Sample:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return Sample(turns=(Turn("user", "1+1?"), Turn("assistant", tool_calls=[call], **keys), *RESULT))


OBJECT = {"a": 1, "b": "é"}
COMPACT = '{"a":1,"b":"é"}'
ARGUMENTS = {
    "wants an object": (
        "{{ c.function.name }}{{ c.function.arguments | tojson }}",
        'add{"a": 1, "b": "é"}',
        'add{"a": 1, "b": "é"}',
    ),
    "wants text": (
        "{{ c.function.name + c.function.arguments }}",
        'add{"a": 1, "b": "é"}',
        "add" + COMPACT,
    ),
    "takes both": (
        "{{ c.function.name }}{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
        'add{"a": 1, "b": "é"}',
        "add" + COMPACT,
    ),
    "adds braces to text": (
        "{{ c.function.name }}{{ '{' }}{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}:{{ v }}{{ ',' if not loop.last }}{% endfor %}{% endif %}{{ '}' }}",
        "add{a:1,b:é}",
        "add{a:1,b:é}",
    ),
    "writes it as it is": (
        "{{ c.function.name }}{{ c.function.arguments }}",
        'add{"a": 1, "b": "é"}',
        "add" + COMPACT,
    ),
    "iterates": (
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}",
        "add<a>1<b>é",
        "add<a>1<b>é",
    ),
}


@pytest.mark.parametrize(("call", "of_object", "of_text"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_reach_the_template_in_its_form(call: str, of_object: str, of_text: str) -> None:
    tokenizer = writing(call)
    forms = [{"arguments": OBJECT}, {"arguments": json.dumps(OBJECT, ensure_ascii=False)}, {"arguments": COMPACT}]
    for arguments, expected in zip((OBJECT, COMPACT), (of_object, of_text), strict=True):
        sample = asked(arguments)
        texts = []
        for form in forms:  # one of the forms gives the same tokens by transformers alone
            turn = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", **form}}],
            }
            raw = [{"role": "user", "content": "1+1?"}, turn, *[t.message() for t in RESULT]]
            try:
                texts.append(trained(sample, tokenizer, raw=raw))
            except Exception:  # anything that a template raises at the wrong form
                continue
        assert texts
        assert texts[0] == [f"<tool_call>{expected}</tool_call><|im_end|>", "Two.<|im_end|>"]


@pytest.mark.parametrize("text", ["{}", '{"a": 1}'])
def test_text_is_not_quoted_again(text: str) -> None:
    [first, _] = trained(
        asked(text), writing("{{ c.function | tojson }}"), raw=[t.message() for t in asked(json.loads(text)).turns]
    )
    assert first == f'<tool_call>{{"name": "add", "arguments": {text}}}</tool_call><|im_end|>'


NULL = {
    "tests for null": (
        "{% if m.content is none %}<nothing>{% else %}{{ m.content }}{% endif %}",
        "<nothing>",
    ),
    "concatenates": ("{{ '' + m.content }}", ""),
    "writes it": ("{{ m.content }}", ""),
}


@pytest.mark.parametrize(("content", "written"), NULL.values(), ids=NULL)
def test_null_reaches_templates_that_test_for_it(content: str, written: str) -> None:
    tokenizer = writing("{{ c.function | tojson }}")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", content)
    sample = asked(OBJECT, is_null=True)
    raw = [turn.message() for turn in asked(OBJECT, is_null=bool(written)).turns]
    [first, _] = trained(sample, tokenizer, raw=raw)
    assert first.removeprefix(written).startswith("<tool_call>")
    assert "None" not in first


def test_a_call_that_is_only_written_beside_null() -> None:
    """As in DeepSeek R1's template. An empty text is null there."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}",
    )
    for sample in (asked(OBJECT), asked(OBJECT, is_null=True)):
        raw = [t.message() for t in asked(json.dumps(OBJECT, ensure_ascii=False), is_null=True).turns]
        texts = trained(sample, with_template(template), raw=raw)
        assert texts == ['add{"a": 1, "b": "é"}<|im_end|>', "Two.<|im_end|>"]


def test_developer_stays_where_the_template_knows_it() -> None:
    sample = Sample(turns=(Turn("developer", "Be kind."), *CHAT))
    system = [t.message() for t in (SYSTEM, *CHAT)]
    assert trained(sample, with_template(CHATML), raw=system) == ["Hello!<|im_end|>", "So long.<|im_end|>"]
    knows = with_template(CHATML + "{# developer #}")
    assert trained(sample, knows) == ["Hello!<|im_end|>", "So long.<|im_end|>"]
    assert "<|im_start|>developer\nBe kind." in knows.decode(Encoder(knows)(sample)[0])


SWITCH = CHATML.replace("{% for", "{{ '<think>' if enable_thinking is not defined or enable_thinking }}{% for", 1)


def test_variables_reach_the_template() -> None:
    tokenizer = with_template(SWITCH)
    sample = Sample(turns=CHAT)
    off = {"template_kwargs": {"enable_thinking": False}}
    assert tokenizer.decode(Encoder(tokenizer)(sample)[0]).startswith("<think>")
    trained(sample, tokenizer, **off)
    assert "<think>" not in tokenizer.decode(Encoder(tokenizer, settings=ChatSettings(**off))(sample)[0])
    own = replace(sample, template_kwargs={"enable_thinking": True})
    trained(own, tokenizer, **off)
    assert tokenizer.decode(Encoder(tokenizer, settings=ChatSettings(**off))(own)[0]).startswith("<think>")
    assert error(own, with_template(CHATML)).endswith(
        "does not read enable_thinking of chat_template_kwargs: "
        "use a template that does, or set data.ignore=[chat_template_kwargs]"
    )
    with pytest.raises(ValueError, match="tools cannot be set here"):
        ChatSettings(template_kwargs={"tools": []})


DOCUMENTS = [{"title": "Rain", "text": "It rains."}]
UNREAD = {
    "tools": (Sample(turns=CHAT, tools=TOOLS), "{{ tools | tojson }}", "tools (add): use a template that knows tools"),
    "documents": (
        Sample(turns=CHAT, documents=DOCUMENTS),
        "{% for d in documents %}{{ d.text }}{% endfor %}",
        "documents: use a template that knows documents",
    ),
    "a name": (
        Sample(turns=(Turn("user", "I am Bob", name="Bob"), *CHAT[1:])),
        "{{ messages[0].name }}",
        "name Bob of messages[0]: use a template that knows names",
    ),
}


@pytest.mark.parametrize(("sample", "reading", "says"), UNREAD.values(), ids=UNREAD)
def test_tools_documents_and_names_that_are_not_written_are_named(sample: Sample, reading: str, says: str) -> None:
    trained(sample, with_template(CHATML))
    found = Encoder(with_template(CHATML)).unread(sample)
    assert found is not None
    assert found.startswith(says)
    reads = with_template(reading + CHATML)
    trained(sample, reads)
    assert Encoder(reads).unread(sample) is None


def test_a_tool_is_not_written_by_its_call() -> None:
    tokenizer = writing("{{ c.function | tojson }}")
    found = Encoder(tokenizer).unread(replace(asked(OBJECT), tools=TOOLS))
    assert found == "tools (add): use a template that knows tools, or set data.ignore=[tools]"


def test_a_short_text_in_another_is_missed_where_it_is_dropped() -> None:
    """Under a template with generation marks too, which needs no marks in the texts."""
    marked = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    dropping = marked.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    sample = Sample(turns=(Turn("system", "Hi"), HI, Turn("assistant", "Hi there")))
    assert "does not write content of messages[0]" in error(sample, with_template(dropping))
