"""jobs/tokenization/encoder.py: every fast way gives the ids and masks of `reference.encode`, or is not used."""

import builtins
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conf.chat_templates import BUNDLED
from jobs.tokenization import bpe_ranks, byte_bpe, encoder, reference, split_patterns
from jobs.tokenization.chat_settings import MASKS, ChatSettings
from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.encoder import Encoder, TokenizersBackend, first_difference
from jobs.tokenization.offsets import MaskedText, TokenizedText, Unsupported
from jobs.tokenization.template_renderer import CompiledRenderer
from tests.jobs.ranks import CLONE
from tests.jobs.tokenization.test_reference import CALLED, CHAT, PLAIN, REWRITES, SYSTEM, TOOLS

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    *(
        "",
        " ",
        "\n",
        "a",
        "I'm HERE'S 'LL we'\u017f",
        "x" * 3000,
        "ab" * 900,
        " " * 700,
        "--- ---- -----",
        "12 345 6789 1 ²",
    ),
    *(
        "blå 😀👩‍👩‍👧 नमस्ते 你好，世界 ﷺ \u3000\u00a0 \u2028",
        "e\u0301a\u0308 \u1e9b\u0323",
        "\u0378 \U0001fae8 \U000323b0 \U000e0001",
    ),
    *(
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|im_end|><|im_end|>",
        "a<s> b</s><|im_en",
        "\r\n\t \r\n  x  \n\n y \n",
        "\0\x02\x03",
    ),
    *(" leading", "trailing ", "\n\nboth\n\n", "<think>no</think>", "a  b   c    d     e\t\t\tf\n\n\ng", "ﬁ ﬀ ǅ K"),
]
CORPUS = [*(text[:99] for text in TEXTS), "the theme of these others is there and then: hello world, so long; bye"] * 3


def with_template_tokens(tokenizer):
    """Add the tokens of every bundled template, and set a template without marks."""
    extra = sorted({token for each in BUNDLED.values() for token in each} | {"[TOOL_CALLS]", "[TOOL_RESULTS]"})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": extra})
    tokenizer.chat_template = PLAIN
    return tokenizer


def trained_bpe(split, size=700, **model):
    """A small byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bundled():
    return with_template_tokens(AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer"))


def gpt2():
    return with_template_tokens(
        PreTrainedTokenizerFast(tokenizer_object=trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    )


def split_by(pattern):
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])


def llama3():
    """As Llama 3: looks up whole words first, lists every pair that makes a token, adds <s>, trims offsets."""
    backend = trained_bpe(split_by(LLAMA3))
    vocabulary = backend.get_vocab()
    order = sorted(vocabulary, key=vocabulary.get)
    pairs = [
        (token[:at], token[at:])
        for token in order
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    backend.model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True)
    tokenizer = with_template_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))
    begins = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begins])
    return tokenizer


def qwen():
    backend = trained_bpe(split_by(LLAMA3.replace("{1,3}", "")))
    backend.normalizer = normalizers.NFC()
    return with_template_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


def neox():
    """As GPT-NeoX: runs of spaces are added tokens, matched after special ones, longest first. Adds a token after the text."""
    tokenizer = gpt2()
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(2, 9)])
    ends = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))]
    )
    tokenizer.backend_tokenizer.post_processor = ends
    return tokenizer


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return with_template_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


MAKERS = {"bundled": bundled, "gpt2": gpt2, "llama3": llama3, "qwen": qwen, "neox": neox, "metaspace": metaspace}
BYTE_LEVEL = [name for name in MAKERS if name != "metaspace"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: make() for name, make in MAKERS.items()}


THOUGHT = Turn("assistant", "Hello!", reasoning_content="\nHm.\n")
NAMED_CALL = Turn("assistant", "Wait.", tool_calls=CALLED[1].tool_calls)
CHATS = [
    Sample(turns=CHAT),
    Sample(turns=(SYSTEM, *CHAT)),
    Sample(turns=(Turn("system", ""), *CHAT)),
    Sample(turns=CALLED, tools=TOOLS),
    Sample(turns=(SYSTEM, *CALLED), tools=TOOLS),
    Sample(turns=(SYSTEM, *CHAT), tools=[]),
    Sample(turns=(CHAT[0], NAMED_CALL, Turn("tool", "2", name="add"), CHAT[1])),
    Sample(turns=(CHAT[0], THOUGHT, *CHAT[2:])),
    Sample(turns=(CHAT[0], Turn("assistant", "Hello!", train=False), *CHAT[2:])),
    Sample(turns=(Turn("user", "Hi", train=True), *CHAT[1:3], Turn("assistant", "So", train=True))),
    Sample(turns=(Turn("user", "Hi", train=False), *CHAT[1:])),
    Sample(turns=(Turn("assistant", "Hello!"), *CHAT)),
    Sample(turns=CHAT[:1]),
    Sample(turns=(Turn("user", "<b>&'\""), Turn("assistant", "\x02 marks \x03"))),
    Sample(turns=(Turn("user", "Hi"), Turn("assistant", tool_calls=[{"function": {"name": "\x02", "arguments": {}}}]))),
    *[Sample(turns=(Turn("user", text), Turn("assistant", text), *CHAT[2:])) for text in TEXTS],
    Sample(),
]
PLAINS = [
    *[Sample(parts=((text, True),)) for text in [*TEXTS, "<s>begun", "ended<|im_end|>", "<s>"]],
    *[Sample(parts=((text, False), (text, True))) for text in TEXTS],
    *[Sample(parts=((text, True), ("", True), (" b" + text, False))) for text in TEXTS],
    *[Sample(parts=tuple((letter, number % 2 == 0) for number, letter in enumerate(text))) for text in TEXTS if text],
    Sample(parts=(("lone \ud800", True),)),
]
FINISHED = [Sample(ids=(5, 6), labels=(-100, 6)), Sample(ids=(5, 6)), Sample(ids=())]


def result(encode, sample):
    try:
        ids, trained = encode(sample)
    except Exception as error:
        return type(error), str(error)
    return list(map(int, ids)), list(map(int, trained))


def assert_same(tokenizer, samples, template=None, mask="assistant"):
    """Compare the fast way with the slow one on every sample, alone and together with all others."""
    fast = Encoder(tokenizer, template=template, settings=ChatSettings(mask))
    for sample, found in zip(samples, fast.encode_fast(samples), strict=True):
        expected = result(lambda sample: reference.encode(sample, tokenizer, template, ChatSettings(mask)), sample)
        assert result(fast, sample) == expected, sample
        assert found is None or result(lambda _, found=found: found, sample) == expected, sample
    return fast


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("template", [*BUNDLED, None])
@pytest.mark.parametrize("name", MAKERS)
def test_chats_are_the_same(
    name: str, template: str | None, mask: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    fast = assert_same(tokenizers[name], CHATS, template, mask)
    assert fast.description.startswith("tokens by tokenizers (" if name == "metaspace" else "tokens by tiktoken,")
    assert fast.description.endswith("chats rendered directly")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MAKERS)
def test_texts_and_token_ids_are_the_same(name: str, mask: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    fast = assert_same(tokenizers[name], [*PLAINS, *FINISHED], mask=mask)
    ids, trained = fast(PLAINS[0])
    assert (ids.dtype, trained.dtype) == (np.int32, np.uint8)


def strange_text(rng):
    points = [
        *map(ord, "  \n\n\r\t'stmREaeiou019-_<>|."),
        0xE9,
        0x301,
        0x323,
        0x4E2D,
        0x1F600,
        0x200D,
        0xAC00,
        0x1100,
        0x1161,
    ]
    pieces = [*map(chr, points), "the", " and", "<|im_end|>", "<s>", "    ", "'ll", "12", "ab"]
    return "".join(rng.choices(pieces, k=rng.randrange(60)))


@pytest.mark.parametrize("name", MAKERS)
def test_strange_texts_are_the_same(name: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    rng = random.Random(7)
    texts = [tuple((strange_text(rng), rng.random() < 0.5) for _ in range(rng.randrange(1, 4))) for _ in range(200)]
    assert_same(tokenizers[name], [Sample(parts=parts) for parts in texts])
    turns = [(Turn("user", strange_text(rng)), Turn("assistant", strange_text(rng))) for _ in range(100)]
    assert_same(tokenizers[name], [Sample(turns=each) for each in turns], "chatml")


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_the_fast_way_is_used(
    name: str, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the comparisons above would compare the slow way with itself."""
    fast = Encoder(tokenizers[name], template="chatml")
    monkeypatch.setattr(fast, "_reference", None)
    texts = [Sample(parts=((text, True),)) for text in TEXTS if name != "qwen" or text.isascii()]
    assert all(len(ids) for ids, _ in fast.encode_fast([*texts, *CHATS[:13]]))
    assert all(len(fast(sample)[0]) for sample in [*texts, *CHATS[:13]])


def test_an_unsupported_text_leaves_the_others_fast(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    fast = Encoder(tokenizers["gpt2"])
    samples = [
        Sample(parts=((text, True),))
        for text in ("a", "half \ud83d", split_patterns.SEPARATOR, split_patterns.CUT, "b  c")
    ]
    assert [found is not None for found in fast.encode_fast(samples)] == [True, False, False, False, True]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_runs_of_whitespace_are_split_the_same(name: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    rng, backend, fast = (
        random.Random(3),
        tokenizers[name].backend_tokenizer,
        byte_bpe.TiktokenBackend(tokenizers[name]),
    )
    pieces = [*split_patterns.WHITESPACE, *"      \n\n\n\r\taB1!'é😀", "<|im_end|>", "the"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(3000)]
    assert (fast._unit_kinds is not None) == (name in ("gpt2", "llama3", "qwen", "neox"))
    for text, found in zip(texts, fast([MaskedText(text, [], [], False) for text in texts]), strict=True):
        assert found is None or found[0].tolist() == backend.encode(text, add_special_tokens=False).ids
        assert found is not None or (name == "qwen" and not text.isascii())


def test_every_character_is_split_the_same(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Each character in several contexts: next to letters, digits, spaces, line ends and punctuation."""
    points = [point for point in byte_bpe.CHANGING if unicodedata.category(point) != "Cn"]
    texts = [
        "".join(f"a{point} {point}1 \n{point}'{point}" for point in points[at : at + 2000])
        for at in range(0, len(points), 2000)
    ]
    for name in ("bundled", "gpt2", "llama3"):
        backend, fast = tokenizers[name].backend_tokenizer, byte_bpe.TiktokenBackend(tokenizers[name])
        for text in texts:
            text = fast._ambiguous.sub("", text) if fast._ambiguous else text
            [found] = fast([MaskedText(text, [], [], False)])
            assert found[0].tolist() == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "template", [REWRITES, PLAIN.replace("{{ m.content }}", "{{ m.content | nowhere }}"), "{% if %}"]
)
def test_errors_are_the_same(
    template: str | None, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers["gpt2"], "chat_template", template)
    assert_same(tokenizers["gpt2"], CHATS)


ODD_TEMPLATES = {
    "a name set inside": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}{{ x }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "loop and namespace": "{% set n = namespace(at=0) %}{% for m in messages %}{% generation %}{% set n.at = n.at + 1 %}"
    "{{ loop.index ~ n.at ~ m.content }}{% endgeneration %}{% endfor %}",
    "in a macro": "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ m.role ~ say(m) }}{% endfor %}",
    "in a set": "{% for m in messages %}{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
    "{{ m.role ~ x }}{% endfor %}",
    "with a macro's names": "{% for m in messages %}{% generation %}{{ m.content }}{{ kwargs }}{% endgeneration %}{% endfor %}",
    "with blanks": "{% for m in messages %}\n  {%- generation -%}  {{ m.content }}  \n{%+ endgeneration %}\n\n{% endfor %}",
    "without a mark that counts": "{% for m in messages %}{%+ generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "a message whole": "{% for m in messages %}{{ m | tojson(indent=2) }}{{ m.items() | list }}{{ m.nothing }}{{ m.get('role') }}"
    "{{ m['content'].strip() }}{% if loop.index0 > 8 %}{% break %}{% endif %}{% endfor %}",
    "unsafe names": "{% for m in messages %}{{ m.__class__ }}{{ m.content.__len__ }}{{ loop.__init__ }}{% endfor %}",
    "what changes a message": "{% for m in messages %}{{ m.update({'a': 1}) }}{% endfor %}",
    "dict and time": "{% set d = dict(a=1) %}{{ d.a }}{{ strftime_now('%Y') }}{{ dict.fromkeys([1]) }}{{ bos_token ~ eos_token }}"
    "{{ documents }}{{ tools }}",
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("template", ODD_TEMPLATES.values(), ids=ODD_TEMPLATES)
def test_odd_templates_are_the_same(
    template: str | None, mask: str, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers["gpt2"], "chat_template", template)
    assert_same(tokenizers["gpt2"], CHATS[:16], mask=mask)


@pytest.mark.parametrize("name", ["in a macro", "in a set", "with a macro's names"])
def test_templates_with_buffered_marks_are_rendered_by_transformers(
    name: str, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported):
        CompiledRenderer(ODD_TEMPLATES[name], {})
    monkeypatch.setattr(tokenizers["gpt2"], "chat_template", ODD_TEMPLATES[name])
    assert Encoder(tokenizers["gpt2"]).description.endswith("chats rendered by transformers")


def test_tokens_of_the_tokenizers_backend_are_the_same(
    tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used for tokenizers that tiktoken does not support, or if tiktoken is not installed."""
    monkeypatch.setattr(
        encoder, "_fastest_backend", encoder._fastest_backend.__wrapped__
    )  # the cached backend uses tiktoken
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "tiktoken":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "tiktoken", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    for name, tokenizer in tokenizers.items():
        fast = assert_same(tokenizer, [*CHATS, *PLAINS], "chatml")
        assert isinstance(fast._backend, TokenizersBackend), name
    assert Encoder(tokenizers["gpt2"]).description.startswith("tokens by tokenizers (tiktoken is not installed)")


REFUSED = {
    "a blank before every text": (
        lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
        "does not split text into bytes by one pattern",
    ),
    "a line's end": (lambda: split_by(r"\s+$|\S+|\s+"), "may interpret its split pattern differently"),
    "possessive": (lambda: split_by(r"\p{N}{1,3}+|\P{N}+"), "may interpret its split pattern differently"),
    "words": (lambda: split_by(r"\w+|\W+"), "may interpret its split pattern differently"),
    "flags": (lambda: split_by(r"(?m)a|[^a]+"), "may interpret its split pattern differently"),
}


@pytest.mark.parametrize(("split", "why"), REFUSED.values(), ids=REFUSED)
def test_unsafe_split_patterns_are_refused(split: Callable[[], pre_tokenizers.PreTokenizer], why: str) -> None:
    tokenizer = with_template_tokens(PreTrainedTokenizerFast(tokenizer_object=trained_bpe(split(), 300)))
    assert why in Encoder(tokenizer).description
    assert_same(tokenizer, [*CHATS, *PLAINS])


def test_a_pattern_with_gaps_is_noticed() -> None:
    tokenizer = with_template_tokens(
        PreTrainedTokenizerFast(tokenizer_object=trained_bpe(split_by(r"\p{L}+|\s+"), 300))
    )
    assert Encoder(tokenizer).description.startswith("tokens by tiktoken")
    assert_same(tokenizer, [*CHATS, *PLAINS])


def model(tokens, pairs, ignore_merges=False):
    """A tokenizer with a list of merges that no training would give."""
    order = {token: number for number, token in enumerate([*bpe_ranks.BYTE_OF_LETTER, *tokens])}
    backend = Tokenizer(models.BPE(vocab=order, merges=pairs, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_template_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


AAA = [("a", "a"), ("a", "aa"), ("aa", "a")]
LISTS = {
    "a token that its letters never become": (["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")]),
    "the same token by two pairs": (["aa", "aaa"], AAA),
    "the other pair first": (["aa", "aaa"], [AAA[0], AAA[2], AAA[1]]),
    "numbers in another order than the merges": (["abc", "ab", "ca"], [("a", "b"), ("c", "a"), ("ab", "c")]),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("tokens", "pairs"), LISTS.values(), ids=LISTS)
def test_merges_are_the_same(tokens: list[str], pairs: list[tuple[str, str]], whole: bool) -> None:
    tokenizer = model(tokens, pairs, whole)
    rng = random.Random(3)
    assert_same(
        tokenizer, [Sample(parts=(("".join(rng.choices("abc", k=rng.randrange(1, 12))), True),)) for _ in range(300)]
    )


def test_whole_words_that_no_merge_makes_need_the_tokenizers_backend() -> None:
    tokens, pairs = LISTS["a token that its letters never become"]
    assert Encoder(model(tokens, pairs)).description.startswith("tokens by tiktoken")
    assert "no listed merge makes" in Encoder(model(tokens, pairs, True)).description


def test_a_whole_word_that_no_two_neighbors_make_is_looked_up() -> None:
    tokenizer = model(["bc", "xbcy"], [("b", "c")], True)
    assert Encoder(tokenizer).description.startswith("tokens by tiktoken")
    assert_same(tokenizer, [Sample(parts=((text, True),)) for text in ("xbcy", "xbcyx", "axbcy", "xbc xbcy")])


def test_fast_false_uses_transformers(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    slow = Encoder(tokenizers["gpt2"], fast=False)
    assert slow.description == "tokens and chats by transformers"
    assert result(slow, CHATS[0]) == result(Encoder(tokenizers["gpt2"]), CHATS[0])
    with pytest.raises(ValueError, match="mask 'user' is unknown"):
        Encoder(tokenizers["gpt2"], settings=ChatSettings("user"))


def test_first_difference_finds_none(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert first_difference(tokenizers["gpt2"], [*CHATS[:-1], *FINISHED], template="chatml") is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda ids, trained, end: (ids + 1, trained, end), r"sample 1: ids\[0\] is \d+ instead of \d+"),
        (lambda ids, trained, end: (ids, 1 - trained, end), r"sample 1: trained\[0\] is 1 instead of 0"),
        (lambda ids, trained, end: (ids[:-1], trained[:-1], end), r"sample 1: \d+ ids instead of \d+"),
    ],
)
def test_first_difference_is_described(
    wrong: Callable[..., tuple[Any, Any, bool]],
    says: str,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = encoder.TiktokenBackend.__call__
    monkeypatch.setattr(
        encoder.TiktokenBackend, "__call__", lambda *given: [TokenizedText(*wrong(*found)) for found in right(*given)]
    )
    found = first_difference(tokenizers["gpt2"], [FINISHED[0], CHATS[0]], template="chatml")
    assert re.fullmatch(says, found)


def test_first_difference_reports_a_missing_error(
    tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "_text", lambda self, sample: MaskedText("...", [], [], False))
    found = first_difference(tokenizers["gpt2"], [Sample(turns=(CHAT[0], THOUGHT))])
    assert found.startswith(
        "sample 0: 3 tokens instead of the error: the chat template does not write reasoning_content"
    )


def test_a_panic_of_the_tokenizer_is_an_error_with_a_remedy(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Its engine for regular expressions gives up on so many blanks, with an exception that is no Exception."""
    rows = [Sample(parts=((" " * count + "x", True),)) for count in (11_000_000, 1_000)]
    with pytest.raises(ValueError, match="fails on a text of 11,000,001 characters.*shorten its blanks"):
        reference.encode(rows[0], tokenizers["llama3"])
    slow = TokenizersBackend(tokenizers["llama3"])
    assert slow([MaskedText(row.parts[0][0], [], [], False) for row in rows])[0] is None
    assert reference.encode(rows[1], tokenizers["llama3"])[0]
