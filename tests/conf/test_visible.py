"""conf/visible.py: what a terminal would act on is shown instead."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import DataError, Problem
from conf.visible import visible
from jobs.distributed import logs

HARMFUL = {
    "\x1b[2J\x1b[31m": r"\x1b[2J\x1b[31m",
    "\x1b]52;c;cm0gLXJm\x07": r"\x1b]52;c;cm0gLXJm\x07",
    "\x1b]8;;http://a.example\x1b\\text": r"\x1b]8;;http://a.example\x1b" + "\\text",
    "\x9b2J\x9d0;title\x9c": r"\x9b2J\x9d0;title\x9c",
    "a\x08b\x7f": r"a\x08b\x7f",
    "\u202egpj.exe\u2066": r"\u202egpj.exe\u2066",
    "\ud800": r"\ud800",
    "hidden\rshown": "hidden\nshown",
}


@pytest.mark.parametrize("text", HARMFUL)
def test_escape_sequences_are_shown(text: str) -> None:
    assert visible(text) == HARMFUL[text]


@pytest.mark.parametrize("text", ["a\tb\nc", "naïve 日本語 עברית 👩‍👩‍👧", "[/INST] [bold]", "C:\\x1b"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text
    assert visible(f"{text}\r\n") == f"{text}\n"


def test_a_message_to_the_user_has_no_escape_sequences() -> None:
    assert str(DataError(Problem("rows", "\x1b[2J", "\x07"))) == r"rows=\x1b[2J: \x07"


@pytest.fixture
def loggers() -> Iterator[None]:
    """Undoes what `logs.set_up` does to Muster's loggers."""
    found = [logging.getLogger(name) for name in ("jobs", "launcher")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in found]
    yield
    for logger, (handlers, level, propagate) in zip(found, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("rank", [None, 0])
def test_an_answer_in_a_log_has_no_escape_sequences(rank: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(rank)
    log = logging.getLogger("jobs.generate")
    log.info("> prompt\n\x1b]0;title\x07")
    log.info("\x1b[32mtrained\x1b[0m", extra=logs.SHOWN)
    lines = capsys.readouterr().out.splitlines()
    assert [
        line.endswith(end) for line, end in zip(lines[1:], (r"\x1b]0;title\x07", "\x1b[32mtrained\x1b[0m"), strict=True)
    ]


def test_no_module_prints_with_rich_but_four_modules() -> None:
    """Rich takes the brackets in a string for markup, so every use must make it a Text."""
    root = Path(__file__).resolve().parents[2]
    users = {
        str(path.relative_to(root))
        for folder in ("conf", "jobs", "launcher", "muster", "pages")
        for path in (root / folder).rglob("*.py")
        if "import Console" in path.read_text() or "import rich" in path.read_text()
    }
    assert users == {
        "launcher/status/terminal.py",
        "launcher/submit/display.py",
        "launcher/convert/command.py",
        "jobs/report/terminal.py",
    }
