"""The prompts of Axolotl's types with one instruction and one answer, as Jinja templates of a row for `data.fields`."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Style(NamedTuple):
    """How a prompt is written: `{system}`, `{instruction}` and `{input}` stand for the texts of a row."""

    system: str
    with_input: str
    without_input: str


class Columns(NamedTuple):
    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    system: str | None = None


STYLES = {
    "instruct": Style(
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": Style("SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"),
    "chatml": Style(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
}
PLAIN = Style("### System:\n{system}\n\n", *STYLES["instruct"][1:])
ORCA = Style(
    "### System:\n{system}\n",
    "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "### Human:\n{instruction}\n### Assistant:\n",
)
TASK = "Below is an instruction that describes a task"
ALPACA = (
    f"{TASK}, paired with an input that provides further context. Write a response that appropriately completes the request.",
    f"{TASK}. Write a response that appropriately completes the request.",
)
"""The system texts of Stanford Alpaca, with an input and without."""
NONE = ("", "")
SUMMARY = "USER: Summarize the following article as a TL;DR.\n{instruction}\n"
TLDR = Style("", SUMMARY + "{input}\nASSISTANT:", SUMMARY + "ASSISTANT:")
ONE_QUESTION = Columns("question", None, "answer")
ROW_SYSTEM = Columns(system="system")
ORCA_COLUMNS = Columns("question", None, "response", "system_prompt")
TYPES: dict[str, tuple[Style | None, tuple[str, str], Columns]] = {
    "alpaca": (None, ALPACA, Columns()),
    "alpaca_instruct": (STYLES["instruct"], ALPACA, Columns()),
    "alpaca_instruct.load_no_prompt": (STYLES["instruct"], NONE, Columns()),
    "alpaca_chat": (STYLES["chat"], ALPACA, Columns()),
    "alpaca_chat.load_no_prompt": (STYLES["chat"], NONE, Columns()),
    "alpaca_w_system.load_instruct": (PLAIN, NONE, ROW_SYSTEM),
    "alpaca_w_system.load_open_orca": (ORCA, NONE, ORCA_COLUMNS),
    "alpaca_w_system.load_open_orca_chatml": (STYLES["chatml"], NONE, ORCA_COLUMNS),
    "alpaca_w_system": (Style("### System:\n{system}\n\n", *STYLES["chat"][1:]), NONE, ROW_SYSTEM),
    "gpteacher": (None, ALPACA, Columns(output="response")),
    "oasst": (None, ALPACA, Columns("INSTRUCTION", None, "RESPONSE")),
    "jeopardy": (None, ALPACA, Columns("question", "category", "what is {{ answer }}")),
    "summarizetldr": (TLDR, NONE, Columns("article", None, "summary")),
}
"""Type -> its style (None: the one behind a colon, or `instruct`), its system texts, its columns."""
TYPES["alpaca_w_system.load_chat"] = TYPES["alpaca_w_system"]


def of_type(kind: str) -> dict[str, str] | None:
    """`data.fields` for a type of Axolotl that writes a prompt; None for other types and styles."""
    name, _, style_name = kind.partition(":")
    if name not in TYPES or (style_name or "instruct") not in STYLES:
        return None
    style, systems, columns = TYPES[name]
    return _fields(style or STYLES[style_name or "instruct"], systems, columns)


def user_defined(kind: Mapping[str, Any]) -> dict[str, str]:
    """`data.fields` for a `type` with a `format` of its own."""
    plain = str(kind.get("no_input_format") or kind.get("format") or "{instruction} ")
    style = Style(
        str(kind.get("system_format") or "{system}"), str(kind.get("format") or "{instruction} {input} "), plain
    )
    named = {name: str(kind.get(f"field_{name}") or name) for name in ("instruction", "input", "output", "system")}
    system = str(kind.get("system_prompt") or "")
    has_column = bool(kind.get("field_system"))
    has_input = style.with_input != style.without_input or "{input}" in style.with_input
    columns = Columns(
        named["instruction"],
        named["input"] if has_input else None,
        named["output"],
        named["system"] if has_column else None,
    )
    return _fields(style, (system, system), columns)


def _fields(style: Style, systems: tuple[str, str], columns: Columns) -> dict[str, str]:
    full = _system(style, systems[0], columns) + _template(style.with_input, columns)
    plain = _system(style, systems[1], columns) + _template(style.without_input, columns)
    if columns.input is None or full == plain:
        return {"prompt": plain, "completion": columns.output}
    choice = "{% if " + columns.input + " %}" + full + "{% else %}" + plain + "{% endif %}"
    return {"prompt": choice, "completion": columns.output}


def _system(style: Style, text: str, columns: Columns) -> str:
    """The begin of a prompt: the system text of the row, or the one that all rows have."""
    if columns.system is not None:
        written = style.system.replace("{system}", "{{ " + columns.system + " }}")
        other = f"{{% else %}}{style.system.replace('{system}', text)}" if text else ""
        return "{% if " + columns.system + " %}" + written + other + "{% endif %}"
    return style.system.replace("{system}", text) if text else ""


def _template(text: str, columns: Columns) -> str:
    text = text.replace("{instruction}", "{{ " + columns.instruction + " }}")
    return text.replace("{input}", "{{ " + columns.input + " }}" if columns.input else "")
