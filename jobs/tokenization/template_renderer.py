"""Renders chats with a Jinja template that is compiled once: the same text and marks as transformers, but faster."""

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
from jobs.tokenization.loss_mask import GENERATION_TAG
from jobs.tokenization.offsets import Span, Unsupported

START, END = "\x02", "\x03"
"""Written around the output of a `generation` block and removed again. A sample that contains one is Unsupported."""
BUFFERS = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.Scope)
"""Nodes that collect text and write it later. transformers counts a mark inside them from the beginning of the collected text."""
MACRO_NAMES = re.compile(r"\b(caller|varargs|kwargs)\b")
"""Names with another meaning inside the generation blocks of transformers, which are macros."""
DICT_NAMES = frozenset(dir(dict))
LOOP_NAMES = frozenset({"first", "last", "index", "index0", "length", "previtem", "nextitem"})


class CompiledRenderer:
    """A `loss_mask.Renderer` without transformers.

    Raises Unsupported where transformers must render instead: at creation for a template, in use for a sample.
    """

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        """variables: the special tokens of the tokenizer, and `template_kwargs`."""
        self.source, self.has_marks = source, bool(GENERATION_TAG.search(source))
        if not _is_plain_json([source, variables]) or (self.has_marks and MACRO_NAMES.search(source)):
            raise Unsupported("the chat template uses the names of macros or control characters reserved for marks")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )
        try:
            tree = environment.parse(source)
            if self.has_marks and _has_buffered_marks(tree):
                raise Unsupported(
                    "the chat template has generation marks inside a macro or another block that is written later"
                )
            self._template = environment.from_string(tree)
        except (TemplateError, SyntaxError) as error:
            raise Unsupported("the chat template has a syntax error") from error
        self._environment = environment
        self._shared_names = {**environment.globals, **variables}

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        text, marks = _remove_marks(self._render(sample, sample.turns, False))
        return text, marks if self.has_marks else []

    def render_prefix(self, sample: Sample, turns: int, generation_prompt: bool) -> str:
        return _remove_marks(self._render(sample, sample.turns[:turns], generation_prompt))[0]

    def _render(self, sample: Sample, turns: tuple[Turn, ...], generation_prompt: bool) -> str:
        for values in (sample.tools, sample.documents):
            if values is not None and not (type(values) is list and _is_plain_json(values)):
                raise Unsupported("the tools or documents are not plain JSON")
        if sample.template_kwargs and not _is_plain_json(dict(sample.template_kwargs)):
            raise Unsupported("the variables of the row are not plain JSON")
        names = {
            **self._shared_names,
            **(sample.template_kwargs or {}),
            "documents": sample.documents,
            "messages": [_message(turn) for turn in turns],
            "tools": sample.tools,
            "add_generation_prompt": generation_prompt,
        }
        # As Template.render does, but without collecting the environment's names again for every text.
        context = self._environment.context_class(self._environment, names, None, self._template.blocks)
        try:
            return "".join(self._template.root_render_func(context))
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the turns: {error}") from error


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as transformers passes it to a template: without empty keys."""
    content = turn.content
    if type(content) is not str or START in content or END in content:
        raise Unsupported("a turn contains control characters reserved for marks")
    message = turn.message()
    if len(message) == 2 and not turn.extra:
        return message
    if not _is_plain_json(message):
        raise Unsupported("a turn is not plain JSON")
    return message


def _is_plain_json(value: Any) -> bool:
    """Whether the value consists of JSON types only and contains neither START nor END."""
    kind = type(value)
    if kind is str:
        return START not in value and END not in value
    if kind is dict:
        return all(_is_plain_json(key) and _is_plain_json(item) for key, item in value.items())
    if kind is list:
        return all(map(_is_plain_json, value))
    return value is None or kind in (bool, int, float)


def _remove_marks(text: str) -> tuple[str, list[Span]]:
    """Returns (the text without START and END, the spans between them)."""
    before, *rest = text.split(START)
    if not rest:
        return text, []
    parts, spans, position = [before], [], len(before)
    for part in rest:
        inside, after = part.split(END)
        spans.append((position, position + len(inside)))
        position += len(inside) + len(after)
        parts += inside, after
    return "".join(parts), spans


def _has_buffered_marks(tree: nodes.Template) -> bool:
    """Whether a generation mark stands inside a node that writes its text later."""
    buffers = [*tree.find_all(BUFFERS), *(loop for loop in tree.find_all(nodes.For) if loop.recursive)]
    return any(START in data.data for buffer in buffers for data in buffer.find_all(nodes.TemplateData))


class _Marks(Extension):
    """Parses `{% generation %}`: START, the block in a scope of its own as in transformers, END."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (START, END))
        return [node.set_lineno(line) for node in (start, nodes.Scope(body), end)]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a faster lookup for what templates read most: the keys of a message and the counters of a loop."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is LoopContext and attribute in LOOP_NAMES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The `tojson` filter of transformers. Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """Stands in for `dict` in templates: attributes of the real type would let a template leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's `namespace` without names that begin with an underscore, which would let a template leave the sandbox too."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # No named `self`: a template may call namespace(self=...).
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
