"""jobs/tokenization/reference.py: the ids are those of the template, and exactly the answers are trained on."""

import json
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.chat_templates import BUNDLED
from jobs.tokenization.chat_settings import ChatSettings
from jobs.tokenization.chat_template import template_source
from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.reference import chat_messages, encode, ends_with_end_token
from tests.jobs.ranks import CLONE

PLAIN = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML as in most tokenizers: without generation marks."""
REWRITES = PLAIN.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
"""Like Qwen3's template, which writes reasoning into the last turn only."""

CHAT = (Turn("user", "Hi"), Turn("assistant", "Hello!"), Turn("user", "Bye"), Turn("assistant", "So long."))
SYSTEM = Turn("system", "Be kind.")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLED = (
    Turn("user", "1+1?"),
    Turn(
        "assistant",
        tool_calls=[
            {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
        ],
    ),
    Turn("tool", "2", tool_call_id="call00001"),
    Turn("assistant", "It is 2."),
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of examples/ with the tokens of every bundled template."""
    tokenizer = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    extra = sorted({token for tokens in BUNDLED.values() for token in tokens} | {"[TOOL_CALLS]", "[TOOL_RESULTS]"})
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": extra})
    (tmp_path / "plain.jinja").write_text(PLAIN)
    tokenizer.chat_template = PLAIN
    return tokenizer


def trained_texts(ids, trained, tokenizer):
    """The text of each unbroken run of trained tokens."""
    runs = groupby(zip(ids, trained, strict=True), key=lambda item: item[1])
    return [tokenizer.decode([token for token, _ in run]) for yes, run in runs if yes]


def ids_of_transformers(sample, tokenizer, template):
    """The ids of `apply_chat_template` for the same turns."""
    return tokenizer.apply_chat_template(
        chat_messages(sample), tools=sample.tools, chat_template=template_source(template, tokenizer), return_dict=True
    )["input_ids"]


QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
CHATML = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long.<|im_end|>\n"
)
KIND = "<|im_start|>system\nBe kind.<|im_end|>\n"
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSo long.<|eot_id|>"
)
GEMMA = (
    "Hi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSo long.<end_of_turn>\n"
)
TEXTS = {
    ("chatml", False): CHATML,
    ("chatml", True): KIND + CHATML,
    ("qwen", False): QWEN + CHATML,
    ("qwen", True): KIND + CHATML,
    ("llama3", False): "<s>" + LLAMA3,
    ("llama3", True): "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>" + LLAMA3,
    ("mistral", False): "<s>[INST] Hi[/INST] Hello!<|im_end|>[INST] Bye[/INST] So long.<|im_end|>",
    ("mistral", True): "<s>[INST] Hi[/INST] Hello!<|im_end|>[INST] Be kind.\n\nBye[/INST] So long.<|im_end|>",
    ("gemma", False): "<s><start_of_turn>user\n" + GEMMA,
    ("gemma", True): "<s><start_of_turn>user\nBe kind.\n\n" + GEMMA,
    (None, False): "<s>" + CHATML,
    (None, True): "<s>" + KIND + CHATML,
}
"""Written by hand from each family's documentation. The tokenizer's eos is <|im_end|>, which mistral writes."""
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
EVERY = [*BUNDLED, None]


def answers(template, *texts):
    """The trained text of these answers: with the end of turn, and mistral's leading space."""
    return [(" " if template == "mistral" else "") + text + ENDS.get(template, "<|im_end|>") for text in texts]


@pytest.mark.parametrize(("template", "system"), TEXTS, ids=str)
def test_a_chat_is_the_documented_text_and_its_answers_are_trained(
    template: str | None, system: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    sample = Sample(turns=(SYSTEM, *CHAT) if system else CHAT)
    ids, trained = encode(sample, tokenizer, template)
    assert tokenizer.decode(ids) == TEXTS[template, system]
    assert ids == ids_of_transformers(sample, tokenizer, template)
    assert trained_texts(ids, trained, tokenizer) == answers(template, "Hello!", "So long.")
    assert ends_with_end_token(ids, trained, tokenizer)


@pytest.mark.parametrize("template", EVERY)
def test_the_mask_policies(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = Sample(turns=CHAT)
    last = encode(sample, tokenizer, template, ChatSettings("last"))
    assert trained_texts(*last, tokenizer) == answers(template, "So long.")
    ids, trained = encode(sample, tokenizer, template, ChatSettings("all"))
    assert all(trained)
    assert ids == last[0] == ids_of_transformers(sample, tokenizer, template)


@pytest.mark.parametrize("template", EVERY)
def test_a_turns_own_flag_wins(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    no, yes = (Turn("assistant", "Hello!", train=flag) for flag in (False, True))
    untaught, taught = (Sample(turns=(CHAT[0], turn, *CHAT[2:])) for turn in (no, yes))
    assert trained_texts(*encode(untaught, tokenizer, template), tokenizer) == answers(template, "So long.")
    assert trained_texts(*encode(taught, tokenizer, template, ChatSettings("last")), tokenizer) == answers(
        template, "Hello!", "So long."
    )
    ids, trained = encode(untaught, tokenizer, template, ChatSettings("all"))
    left_out = tokenizer.decode([token for token, yes in zip(ids, trained, strict=True) if not yes])
    assert [left_out] == answers(template, "Hello!")


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_flag_reaches_a_users_turn(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = Sample(turns=(Turn("user", "Hi", train=True), *CHAT[1:]))
    ids, trained = encode(asked, tokenizer, template, ChatSettings("last"))
    assert trained_texts(ids, trained, tokenizer) == [
        "Hi<|im_end|>",
        "So long.<|im_end|>",
    ]


CALL = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALL = (
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n" + CALL + "\n</tool_call><|im_end|>\n"
    "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>\n"
)
LLAMA3_ASK = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name '
    "and its value}. Do not use variables.\n\n"
)
TOOL_TEXTS = {
    "chatml": "<|im_start|>system\n" + QWEN_TOOLS + QWEN_CALL,
    "qwen": QWEN.removesuffix("<|im_end|>\n") + "\n\n" + QWEN_TOOLS + QWEN_CALL,
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n"
    + LLAMA3_ASK
    + json.dumps(TOOLS[0], indent=4)
    + "\n\n1+1?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    + CALL.replace("arguments", "parameters")
    + "<|eot_id|>"
    "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 2.<|eot_id|>",
    "mistral": '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
    "[/AVAILABLE_TOOLS][INST] 1+1?[/INST][TOOL_CALLS] [" + CALL[:-1] + ', "id": "call00001"}]<|im_end|>'
    '[TOOL_RESULTS] {"content": 2, "call_id": "call00001"}[/TOOL_RESULTS] It is 2.<|im_end|>',
}
CALLS = {
    "chatml": "<tool_call>\n" + CALL + "\n</tool_call><|im_end|>",
    "qwen": "<tool_call>\n" + CALL + "\n</tool_call><|im_end|>",
    "llama3": CALL.replace("arguments", "parameters") + "<|eot_id|>",
    "mistral": "[TOOL_CALLS] [" + CALL[:-1] + ', "id": "call00001"}]<|im_end|>',
}


@pytest.mark.parametrize("template", TOOL_TEXTS)
def test_calls_are_trained_and_results_are_not(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = Sample(turns=CALLED, tools=TOOLS)
    ids, trained = encode(sample, tokenizer, template)
    assert tokenizer.decode(ids) == TOOL_TEXTS[template]
    assert ids == ids_of_transformers(sample, tokenizer, template)
    assert trained_texts(ids, trained, tokenizer) == [CALLS[template], *answers(template, "It is 2.")]


@pytest.mark.parametrize("template", ["chatml", "qwen"])
def test_several_calls_and_results_share_a_turn(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    turns = (
        CHAT[0],
        Turn("assistant", "Wait.", tool_calls=[call] * 2, reasoning_content="Two."),
        *[Turn("tool", "2")] * 2,
    )
    ids, trained = encode(Sample(turns=turns), tokenizer, template)
    written = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert trained_texts(ids, trained, tokenizer) == [
        f"<think>\nTwo.\n</think>\n\nWait.\n{written}\n{written}<|im_end|>"
    ]
    result = "\n<tool_response>\n2\n</tool_response>"
    assert tokenizer.decode(ids).endswith(f"<|im_start|>user{result}{result}<|im_end|>\n")


ODD = [" blue", "\nblue", "\n\n\nblue  ", "blå 😀", "😀", "  ", "1.\n\n2."]


@pytest.mark.parametrize("trims", [False, True], ids=["", "offsets without blanks"])
@pytest.mark.parametrize("template", ["chatml", "qwen", None])
@pytest.mark.parametrize("answer", ODD, ids=repr)
def test_whitespace_at_a_boundary_and_multibyte_characters(
    answer: str, template: str | None, trims: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    if trims:  # like Llama 3's tokenizer, whose whitespace tokens get empty offsets
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    sample = Sample(turns=(CHAT[0], Turn("assistant", answer), *CHAT[2:]))
    ids, trained = encode(sample, tokenizer, template)
    assert ids == ids_of_transformers(sample, tokenizer, template)
    first, second = trained_texts(ids, trained, tokenizer)
    assert first.endswith(answer + "<|im_end|>")
    assert first.removesuffix(answer + "<|im_end|>") in ("", "\n")  # a token may also hold the header's line end
    assert second == "So long.<|im_end|>"


@pytest.mark.parametrize("template", BUNDLED)
def test_transformers_own_mask_is_the_same(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = Sample(turns=CHAT)
    found = tokenizer.apply_chat_template(
        chat_messages(sample),
        chat_template=template_source(template, tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encode(sample, tokenizer, template) == (found["input_ids"], found["assistant_masks"])


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_token_across_the_boundary_is_trained(template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """A token of two line ends, as in real vocabularies: one of the header, one of the answer."""
    tokenizer.add_tokens(["\n\n"])
    sample = Sample(turns=(CHAT[0], Turn("assistant", "\nSo")))
    ids, trained = encode(sample, tokenizer, template)
    assert ids == ids_of_transformers(sample, tokenizer, template)
    assert trained_texts(ids, trained, tokenizer) == ["\n\nSo<|im_end|>"]


def test_text_gets_one_end(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, trained = encode(Sample(parts=(("A page.\n", True),)), tokenizer)
    assert tokenizer.decode(ids) == "A page.\n<|im_end|>"
    assert all(trained)
    assert ends_with_end_token(ids, trained, tokenizer)
    assert encode(Sample(parts=(("A page.\n<|im_end|>", True),)), tokenizer) == (ids, trained)


@pytest.mark.parametrize("trims", [False, True], ids=["", "offsets without blanks"])
def test_only_the_completion_is_trained(trims: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    sample = Sample(parts=(("The sky is", False), (" blue.", True)))
    ids, trained = encode(sample, tokenizer)
    assert tokenizer.decode(ids) == "The sky is blue.<|im_end|>"
    assert trained_texts(ids, trained, tokenizer) == [" blue.<|im_end|>"]
    assert all(encode(sample, tokenizer, settings=ChatSettings("all"))[1])
    ids, trained = encode(Sample(parts=((" yes", True), (" no", False))), tokenizer)
    assert trained_texts(ids, trained, tokenizer) == [" yes"]
    assert not ends_with_end_token(ids, trained, tokenizer)


PARTS = {
    "a blank before an end": ([("yes ", True), ("<|im_end|>", False)], ["yes "]),
    "a blank that the next word takes": ([("yes ", True), ("no", False)], ["yes no"]),
    "a blank that the word before takes": ([("a-", False), (" ", True), ("<|im_end|>", False)], ["- "]),
    "nothing inside a word": ([("It i", False), ("", True), ("s", False)], []),
}


@pytest.mark.parametrize(("parts", "expected"), PARTS.values(), ids=PARTS)
def test_tokens_with_trimmed_offsets(
    parts: list[tuple[str, bool]], expected: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.add_tokens(["- "])
    sample = Sample(parts=tuple(parts))
    plain = encode(sample, tokenizer)
    assert trained_texts(*plain, tokenizer) == expected
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert encode(sample, tokenizer) == plain


def test_text_begins_once(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")],
    )
    for text in ("So", "<s>So"):
        ids, trained = encode(Sample(parts=((text, True),)), tokenizer)
        assert tokenizer.decode(ids) == "<s>So<|im_end|>"
        assert trained[1:] == [1] * (len(ids) - 1)
    ids, trained = encode(Sample(parts=(("So", True), (" it", False))), tokenizer)
    assert trained_texts(ids, trained, tokenizer) == ["So"]
    ids, trained = encode(Sample(parts=(("So", False), (" it", True))), tokenizer)
    assert trained_texts(ids, trained, tokenizer) == [" it<|im_end|>"]
    assert tokenizer.decode(encode(Sample(turns=CHAT), tokenizer)[0]) == TEXTS[None, False]


def test_token_ids_keep_their_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(Sample(ids=(5, 6), labels=(-100, 6)), tokenizer) == ([5, 6], [0, 1])


def test_a_file_is_a_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert encode(Sample(turns=CHAT), tokenizer, str(tmp_path / "plain.jinja")) == encode(Sample(turns=CHAT), tokenizer)


def test_samples_without_an_end_token_are_noticed(tokenizer: PreTrainedTokenizerBase) -> None:
    endless = PLAIN.replace("{{ m.content }}<|im_end|>", "{{ m.content }}")
    tokenizer.chat_template = endless
    assert not ends_with_end_token(*encode(Sample(turns=CHAT), tokenizer), tokenizer)
    assert not ends_with_end_token([5], [0], tokenizer)


def test_templates_may_rewrite_earlier_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = REWRITES
    last = "<think></think>So long.<|im_end|>"
    assert trained_texts(*encode(Sample(turns=CHAT), tokenizer), tokenizer) == ["Hello!<|im_end|>", last]
    assert trained_texts(*encode(Sample(turns=CHAT[:2]), tokenizer), tokenizer) == ["<think></think>Hello!<|im_end|>"]
    assert trained_texts(*encode(Sample(turns=CHAT), tokenizer, settings=ChatSettings("last")), tokenizer) == [last]
    taught = Sample(turns=(CHAT[0], Turn("assistant", "Hello!", train=True), *CHAT[2:]))
    assert all(encode(taught, tokenizer, settings=ChatSettings("all"))[1])


def test_templates_that_rewrite_and_change_with_the_text_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = REWRITES.replace("{{ m.content }}", "{{ m.content | length }}{{ m.content }}")
    with pytest.raises(
        ValueError, match="rewrites earlier turns, so the beginning and end of turn 1 .* such as one of chatml"
    ):
        encode(Sample(turns=CHAT), tokenizer)


def test_marks_that_miss_a_turn_are_refused_only_where_it_matters(tokenizer: PreTrainedTokenizerBase) -> None:
    marked = "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", marked)
    assert trained_texts(*encode(Sample(turns=CHAT), tokenizer), tokenizer) == ["So long."]
    with pytest.raises(ValueError, match="has 1 generation marks for 2 assistant turns"):
        encode(Sample(turns=CHAT), tokenizer, settings=ChatSettings("last"))


LONE = (Turn("assistant", "Hello!"), *CHAT)
THOUGHT = (CHAT[0], Turn("assistant", "Hello!", reasoning_content="Hm."))
BOTH = (CHAT[0], Turn("assistant", "Wait.", tool_calls=CALLED[1].tool_calls))
NO_ID = (CHAT[0], Turn("assistant", tool_calls=[{"function": {"name": "add", "arguments": {}}}]))


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        ("gemma", LONE, "gemma needs user and assistant turns to alternate"),
        ("gemma", THOUGHT, "gemma has no format for tool calls or reasoning"),
        ("llama3", THOUGHT, "llama3 has no format for reasoning_content"),
        ("llama3", BOTH, "llama3 allows one tool call and no text"),
        ("mistral", BOTH, "mistral allows either text or tool calls"),
        ("mistral", NO_ID, "mistral needs an id of nine"),
        ("mistral", (SYSTEM, CHAT[1]), "mistral needs a user turn"),
        ("nowhere.jinja", CHAT, "'nowhere.jinja' is not a readable file and not one of chatml"),
    ],
)
def test_turns_that_a_template_cannot_format_are_refused(
    template: str | None, turns: tuple[Turn, ...], says: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=says):
        encode(Sample(turns=turns), tokenizer, template)


def test_a_template_of_another_family_is_refused() -> None:
    bundled = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    with pytest.raises(ValueError, match="template llama3 needs .*, which the tokenizer does not have"):
        encode(Sample(turns=CHAT), bundled, "llama3")
    assert trained_texts(*encode(Sample(turns=CHAT), bundled), bundled) == answers(None, "Hello!", "So long.")
    bundled.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: set data.chat_template to one of"):
        encode(Sample(turns=CHAT), bundled)


def test_an_unknown_mask_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="mask 'user' is unknown: use one of assistant, last, all"):
        encode(Sample(turns=CHAT), tokenizer, settings=ChatSettings("user"))
