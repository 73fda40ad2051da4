"""Reads HTML pages for tests: their elements and texts, and whether elements are closed in order."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'
VOID = {"meta", "line", "rect", "link", "img", "br", "input"}
OPTIONAL = {"th", "td", "tr", "li"}
"""Elements whose end tag HTML allows to leave out."""


@dataclass
class Parsed(HTMLParser):
    """Collects the elements and the text of a page, and checks that elements are closed in order."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL:
            self.opened.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID | OPTIONAL:
            assert self.opened.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def parsed(text):
    found = Parsed()
    found.feed(text)
    found.close()
    assert not found.opened
    return found
