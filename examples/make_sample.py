"""Generates the bundled sample from facts.txt: sample.jsonl, prompts.jsonl and tokenizer/.

`python examples/make_sample.py` writes them, with the same bytes every time. With `--check` it writes nothing, and exits with 1
if a file on disk differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SEED = 1024
VOCAB_SIZE = 1024  # special tokens and the 256 bytes included; an embedding of 1024 rows keeps the demo model tiny
MAX_TOKENS = 512  # the longest row of the sample has about 80

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2; Llama's end-of-text token is 2 too

# Questions about facts in the sample, in words that no row uses (`rows` raises an error if one does).
PROMPTS = (
    "Please tell me what the command squeue does.",
    "Please explain what a shard is.",
    "Which city is the capital city of Japan?",
    "Could you tell me how to cancel a job?",
)

# `{% generation %}` marks what the assistant wrote, including the end token. Only these tokens are trained.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("role must be system, user or assistant, not " ~ message.role) }}
    {%- endif %}
    {{- "<|im_start|>" ~ message.role ~ "\\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{- message.content ~ "<|im_end|>" }}{%- endgeneration %}
    {%- else %}
        {{- message.content ~ "<|im_end|>" }}
    {%- endif %}
    {{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

Row = dict[str, str]  # instruction, input (may be empty), output


@dataclass
class Topic:
    """Facts that share their questions and their form of answer. A fact is a list of the texts for x, y and z."""

    name: str
    asks: list[str] = field(default_factory=list)
    say: str = ""
    facts: list[list[str]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file on disk differs")
    check = parser.parse_args().check
    stale = []
    for name, content in build().items():
        path = HERE / name
        if path.exists() and path.read_bytes() == content:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    if check and stale:
        print(f"examples/ is out of date: {', '.join(stale)}; run `python examples/make_sample.py`", file=sys.stderr)
        return 1
    print(f"examples/ is up to date; {len(stale)} file(s) written")
    return 0


def build() -> dict[str, bytes]:
    """Every generated file as `{path relative to examples/: content}`."""
    sample = rows([*parse(HERE.joinpath("facts.txt").read_text(encoding="utf-8")), *compute()])
    tokenizer = train_tokenizer(sample)
    files = {
        "sample.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample),
        "prompts.jsonl": "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS),
        "tokenizer/tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer/tokenizer_config.json": json.dumps(tokenizer_config(), indent=2) + "\n",
        "tokenizer/chat_template.jinja": CHAT_TEMPLATE,
    }
    return {name: text.encode() for name, text in files.items()}


def parse(text: str) -> list[Topic]:
    """Read the topics of facts.txt; the comment at its top explains the format."""
    topics: list[Topic] = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            topics.append(Topic(line.strip("[]")))
        elif line.startswith("ask: "):
            topics[-1].asks.append(line.removeprefix("ask: "))
        elif line.startswith("say: "):
            topics[-1].say = line.removeprefix("say: ")
        else:
            topics[-1].facts += [fact.split(" = ") for fact in line.split("; ")]
    return topics


def compute() -> list[Topic]:
    """The topics that are computed instead of written in facts.txt: sums and counting."""
    sums = [[str(a), str(b), str(a + b)] for a in range(1, 6) for b in range(a, 6)]
    counts = [[str(n), ", ".join(map(str, range(1, n)))] for n in range(3, 11)]
    sum_asks = ["What is {x} plus {y}?", "How much is {x} plus {y}?", "Tell me the sum of {x} and {y}."]
    sum_asks += ["Add {x} and {y}.", "Please add {x} to {y}.", "Add these two numbers. | {x} and {y}"]
    count_asks = ["Count to {x}.", "Count from 1 to {x}.", "Count from 1 up to this number. | {x}"]
    count_asks += ["Please count up to {x}.", "Write all numbers from 1 to {x}."]
    return [
        Topic("sums", sum_asks, "The sum of {x} and {y} is {z}.", sums),
        Topic("counting", count_asks, "Counting to {x} goes {y} and {x}.", counts),
    ]


def rows(topics: list[Topic]) -> list[Row]:
    """One row for every question of a topic and every fact of it, in a seeded random order.

    Raises ValueError if a question appears twice, or if a prompt is also a question.
    """
    answers: dict[tuple[str, str], str] = {}
    for topic in topics:
        for fact in topic.facts:
            values = placeholders(fact)
            for ask in topic.asks:
                instruction, _, given = ask.format(**values).partition(" | ")
                if (instruction, given) in answers:
                    raise ValueError(f"[{topic.name}] asks {instruction!r} (input {given!r}) twice")
                answers[instruction, given] = topic.say.format(**values)
    if repeated := [prompt for prompt in PROMPTS if (prompt, "") in answers]:
        raise ValueError(f"these prompts are also questions of the sample; reword them: {repeated}")
    rng = random.Random(SEED)
    shuffled = sorted(
        answers.items(), key=lambda _: rng.random()
    )  # only random() gives the same values in every Python version
    return [{"instruction": ask, "input": given, "output": say} for (ask, given), say in shuffled]


def placeholders(fact: list[str]) -> dict[str, str]:
    """The placeholders that a question or an answer may use for this fact: x, y, z, X (x capitalized), w (x without article)."""
    x = fact[0]
    bare = x.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    return {**dict(zip("xyz", fact, strict=False)), "X": x[0].upper() + x[1:], "w": bare}


def train_tokenizer(sample: list[Row]) -> Tokenizer:
    """A byte-level BPE, so that any UTF-8 text is decoded unchanged. Each digit is a token, so that a model can learn sums."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    names = ["system\n", "user\n", "assistant\n"]  # the chat template writes one of these before each text
    tokenizer.train_from_iterator([*names, *(text for row in sample for text in row.values())], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"facts.txt is too short for {VOCAB_SIZE} tokens: got {tokenizer.get_vocab_size()}")
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """The file that AutoTokenizer reads besides tokenizer.json. `save_pretrained` would write other keys in each version."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "eos_token": END,
        "additional_special_tokens": [START],
    }


if __name__ == "__main__":
    sys.exit(main())
