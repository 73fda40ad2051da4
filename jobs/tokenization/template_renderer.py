"""Renders chats through a template that is compiled once, with the very text and marks of transformers, only sooner."""

import json
import re
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.loss_mask import MARK
from jobs.tokenization.offsets import Span, Unfit

START, END = "\x02", "\x03"
"""Written round what a `generation` block writes, and taken out again; a sample that holds one is `Unfit`."""
BUFFERS = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.Scope)
"""What collects text before it is written: transformers counts a mark inside of one from another beginning."""
MACRO_NAMES = re.compile(r"\b(caller|varargs|kwargs)\b")
"""Names that mean something else inside of transformers' blocks, which are macros."""
DICT_NAMES = frozenset(dir(dict))
LOOP_NAMES = frozenset({"first", "last", "index", "index0", "length", "previtem", "nextitem"})


class Rendering:
    """A `chat.Renderer`. Raises Unfit, at once for a template, and in use for a sample, that transformers must render."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.marked = bool(MARK.search(source))
        if not _plain([source, special_tokens]) or (self.marked and MACRO_NAMES.search(source)):
            raise Unfit("the chat template uses the names or characters of marks")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )
        try:
            tree = environment.parse(source)
            if self.marked and _buffered(tree):
                raise Unfit("the chat template has generation marks inside of a block that is written later")
            self._template = environment.from_string(tree)
        except (TemplateError, SyntaxError) as error:
            raise Unfit("the chat template has an error") from error
        self._environment, self._always = environment, {**environment.globals, **special_tokens, "documents": None}

    def whole(self, sample: Sample) -> tuple[str, list[Span]]:
        text, marks = _cut(self._render(sample, sample.turns, False))
        return text, marks if self.marked else []

    def first(self, sample: Sample, turns: int, prompt: bool) -> str:
        return _cut(self._render(sample, sample.turns[:turns], prompt))[0]

    def _render(self, sample: Sample, turns: tuple[Turn, ...], prompt: bool) -> str:
        if sample.tools is not None and not (type(sample.tools) is list and _plain(sample.tools)):
            raise Unfit("the tools are not plain JSON")
        names = {
            **self._always,
            "messages": [_message(turn) for turn in turns],
            "tools": sample.tools,
            "add_generation_prompt": prompt,
        }
        # as Template.render, which gathers the environment's names again for every text
        context = self._environment.context_class(self._environment, names, None, self._template.blocks)
        return "".join(self._template.root_render_func(context))


def _message(turn: Turn) -> dict[str, Any]:
    """What transformers shows a template of a turn: no keys without a value, and a thought under both its names."""
    content, thought = turn.content, turn.reasoning_content
    if type(content) is not str or START in content or END in content:
        raise Unfit("a turn holds characters of marks")
    if turn.tool_calls is None and turn.name is None and turn.tool_call_id is None and thought is None:
        return {"role": turn.role, "content": content}
    message = {key: value for key, value in vars(turn).items() if value is not None and key != "train"}
    if not _plain(message):
        raise Unfit("a turn is not plain JSON")
    return message if thought is None else {"thinking": thought, **message}


def _plain(value: Any) -> bool:
    """Whether the value is JSON's alone, and free of the marks."""
    kind = type(value)
    if kind is str:
        return START not in value and END not in value
    if kind is dict:
        return all(_plain(key) and _plain(item) for key, item in value.items())
    if kind is list:
        return all(map(_plain, value))
    return value is None or kind in (bool, int, float)


def _cut(text: str) -> tuple[str, list[Span]]:
    """(the text without the marks, the stretches between them)."""
    before, *rest = text.split(START)
    if not rest:
        return text, []
    pieces, spans, at = [before], [], len(before)
    for piece in rest:
        inside, after = piece.split(END)
        spans.append((at, at + len(inside)))
        at += len(inside) + len(after)
        pieces += inside, after
    return "".join(pieces), spans


def _buffered(tree: nodes.Template) -> bool:
    holders = [*tree.find_all(BUFFERS), *(loop for loop in tree.find_all(nodes.For) if loop.recursive)]
    return any(START in data.data for holder in holders for data in holder.find_all(nodes.TemplateData))


class _Marks(Extension):
    """`{% generation %}`: a scope of its own, as in transformers, between the two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (START, END))
        return [node.set_lineno(line) for node in (start, nodes.Scope(body), end)]


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with a short way to a message's keys and a loop's numbers, which templates read most."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is LoopContext and attribute in LOOP_NAMES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without the type's attributes, through which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore, for the same reason."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may say namespace(self=...)
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: rename it in the chat template")
