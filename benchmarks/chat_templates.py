"""Compares Muster with transformers and with texts marked by hand, on six chats under every chat template that TRL ships.

The table has a sign for each chat:

    =   the tokens are those of `apply_chat_template` for the row as it is, and the trained texts are those marked by hand
    =o  the same, with the arguments of calls as an object; =s as text; n: with null beside the call; p: with contents in parts
    e   the token that ends the last answer comes on top, because the template does not write it
    t   the template does not write the tools, which the gate `unwritten` counts
    -   the chat is refused; the reasons stand below the table


    make bench-templates                               installs TRL beside in .bench, compares, and prints the table of docs/data.md
    python benchmarks/chat_templates.py --folder DIR   uses the *.jinja files of a folder

chat_templates.json has for each template and chat the texts that must be trained, or the beginning of the reason to refuse the
chat. Every one of them was read and marked by hand. The exit code is 1 if anything differs.
"""

import argparse
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.data import formats
from jobs.tokenization import reference
from jobs.tokenization.encoder import Encoder

CLONE = Path(__file__).parents[1]
TRUTH = Path(__file__).with_suffix(".json")
TOKEN = re.compile(
    r"<\|[\w ]+\|?>|<[\w]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|</?think>"
    r"|\[/?INST\]|\[gMASK\]|<sop>|</?tool_calls?>|</?tool_response>"
)
"""What the templates write as special tokens."""
END_OF_TEXT = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma": "<eos>",
    "diffusion_gemma": "<eos>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "llama": "<|eot_id|>",
    "llava": "</s>",
    "phi3": "<|endoftext|>",
    "smolvlm": "<end_of_utterance>",
    "idefics": "<end_of_utterance>",
}
"""End-of-text tokens by the beginning of the template's name; else <|im_end|>."""


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def _called(content: str | None, arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "yes"}
    return [_user("Rain?"), _assistant(content, tool_calls=[call]), result, _assistant("It rains.")]


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where."}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}},
]
CHATS: dict[str, dict[str, Any]] = {
    "single turn": {"messages": [_user("Hi"), _assistant("Hello!")]},
    "multi-turn": {"messages": [_user("Hi"), _assistant("Hello!"), _user("Bye"), _assistant("So long.")]},
    "system": {"messages": [{"role": "system", "content": "Be kind."}, _user("Hi"), _assistant("Hello!")]},
    "tools": {"messages": _called("", {"city": "Paris"}), "tools": TOOLS},
    "thoughts": {
        "messages": [
            _user("Hi"),
            _assistant("Hello!", reasoning_content="Greet."),
            _user("1+1?"),
            _assistant("It is 2.", reasoning_content="Count up."),
        ]
    },
    "null content": {"messages": _called(None, '{"city": "Paris"}'), "tools": TOOLS},
}
"""The last one has the shape of OpenAI: null beside a call, and its arguments as text."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="folder of *.jinja files")
    arguments = options.parse_args()
    logging.disable(logging.WARNING)
    folder = arguments.folder or _folder_of_trl()
    truth = json.loads(TRUTH.read_text(encoding="utf-8"))
    found = {
        path.stem: _results(path) for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith("_training")
    }
    wrong = list(_differences(found, truth))
    print("\n".join(_table(found)))
    refusals = {text for chats in found.values() for text, _ in chats.values() if isinstance(text, str)}
    print(f"\n{sum(len(chats) for chats in found.values())} chats, {len(wrong)} differ from the truth")
    print("\n".join(f"refused: {text}" for text in sorted(refusals)))
    print("\n".join(wrong))
    return bool(wrong)


def _folder_of_trl() -> Path:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        sys.exit("TRL is not installed for this Python: call make bench-templates, or name a folder with --folder")
    return Path(found.origin).parent / "chat_templates"


def _tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    """The bundled tokenizer with this template and the tokens that it writes."""
    tokenizer = AutoTokenizer.from_pretrained(CLONE / "examples/tokenizer")
    end = next((token for prefix, token in END_OF_TEXT.items() if name.startswith(prefix)), "<|im_end|>")
    tokens = sorted(set(TOKEN.findall(source)) - {end})
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": end, "additional_special_tokens": tokens})
    tokenizer.chat_template = source
    return tokenizer


def _results(path: Path) -> dict[str, tuple[list[str] | str, str]]:
    """For each chat: the trained texts or the reason to refuse it, and the cell of the table."""
    tokenizer = _tokenizer(path.stem, path.read_text(encoding="utf-8"))
    return {kind: _result(chat, tokenizer) for kind, chat in CHATS.items()}


def _result(chat: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str] | str, str]:
    sample, encoder = formats.convert(chat, "messages"), Encoder(tokenizer)
    try:
        ids, marks = reference.encode(sample, tokenizer)
    except ValueError as error:
        return str(error), "-"
    assert [part.tolist() for part in encoder(sample)] == [ids, marks], "the fast way must equal the slow one"
    runs = groupby(zip(ids, marks, strict=True), key=lambda item: item[1])
    texts = [tokenizer.decode([token for token, _ in run]) for yes, run in runs if yes]
    cell = _how_equal(chat, ids, tokenizer)
    if not reference.ends_with_end_token(ids, marks, tokenizer):
        cell += " endless"
    return texts, cell + (" t" if encoder.unread(sample) else "")


def _how_equal(chat: dict[str, Any], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """`=` if the ids are those of `apply_chat_template` for the row as it is; a letter where the row has another form."""
    end = ids[-1:]
    for sign, messages in _forms(chat["messages"]):
        ends: tuple[tuple[list[int], str], ...] = (([], ""), (end, "e"))
        for ending, mark in ends:  # GLM: the token that ends the last answer comes on top
            try:
                if _reference(messages, chat.get("tools"), tokenizer) + ending == ids:
                    return f"={sign}{mark}"
            except Exception:  # anything that a template raises at the wrong form
                continue
    return "differs"


def _reference(messages: list[dict[str, Any]], tools: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not any(message.get("content", "") is None for message in messages):
        return list(tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"])
    # `apply_chat_template` would leave out null.
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, "tools": tools}
    text = render_jinja_template([messages], chat_template=tokenizer.chat_template, **variables)[0][0]
    return tokenizer.encode(text, add_special_tokens=False)


def _forms(messages: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(sign, messages): the row as `apply_chat_template` reads it, then with its calls in other forms."""
    absent = [{key: value for key, value in message.items() if value is not None} for message in messages]
    yield "", absent
    for sign, arguments in (("", None), ("o", {"city": "Paris"}), ("s", '{"city": "Paris"}')):
        for content_sign, content in (("", "absent"), ("n", None), ("", "")):
            form = json.loads(json.dumps(messages))
            for message in form:
                for call in message.get("tool_calls", ()):
                    call["function"]["arguments"] = arguments or call["function"]["arguments"]
                    message["content"] = content
                    if content == "absent":
                        del message["content"]
            yield sign + content_sign, form
    yield "p", [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _differences(found: dict[str, Any], truth: dict[str, Any]) -> Iterator[str]:
    for name, chats in found.items():
        for kind, (result, cell) in chats.items():
            expected = truth.get(name, {}).get(kind)
            same = result == expected or (
                isinstance(result, str) and isinstance(expected, str) and result.startswith(expected)
            )
            if not same or "differs" in cell or "endless" in cell:
                yield f"{name}, {kind}: {cell}\n  found    {result}\n  expected {expected}"


def _table(found: dict[str, Any]) -> Iterator[str]:
    """One line for all templates with the same cells."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, chats in found.items():
        names.setdefault(tuple(cell for _, cell in chats.values()), []).append(name)
    yield "| template | " + " | ".join(CHATS) + " |"
    yield "|---|" + "---|" * len(CHATS)
    for cells, equal in names.items():
        yield f"| {', '.join(equal)} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
