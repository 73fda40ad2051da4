"""Prints with colors on a terminal, and without anywhere else, under NO_COLOR and with TERM=dumb. Rich, which is slow to import, is
imported for terminals only."""

import sys
from typing import Any, TextIO

from conf.visible import visible
from launcher.run_folder.status import COMPLETED, PLANNED

COLORS = {
    COMPLETED: "green",
    **dict.fromkeys(("running", "completing", "training"), "cyan"),
    **dict.fromkeys(("waiting", "to", "not", "no"), "dim"),  # to come, not started, no job
    **dict.fromkeys((*PLANNED, "pending", "configuring", "requeued", "suspended", "unknown", "ended"), "yellow"),
}
"""By the first word of a state or a verdict. All others are failures."""
FAILURE, ERROR = "red", "bold red"


def style(state: str) -> str:
    """The color of a state or a verdict, in any case of letters; empty for none."""
    words = state.lower().split()
    return COLORS.get(words[0], FAILURE) if words else ""


def console(stream: TextIO | None = None) -> Any:
    """A console of rich. Without a terminal its lines are long and not folded, because people grep them."""
    from rich.console import Console

    found = Console(file=stream)
    if not found.is_terminal:
        return Console(file=stream, width=240)
    if found.no_color or found.is_dumb_terminal:  # no bold either: nothing but text
        return Console(file=stream, color_system=None)
    return found


def say(text: str, look: str = "", *, until: int | None = None, stream: TextIO | None = None) -> None:
    """Print a text, up to the character `until` in a style of rich."""
    to, text = stream or sys.stdout, visible(text)
    if not look or not to.isatty():
        print(text, file=to, flush=True)
        return
    from rich.text import Text

    shown = Text(text)
    shown.stylize(look, 0, len(text) if until is None else until)
    console(to).print(shown, soft_wrap=True)


def error(prog: str, message: str) -> None:
    """Print what is wrong to standard error, behind the name of the command in red."""
    say(f"{prog}: {message}", ERROR, until=len(prog) + 1, stream=sys.stderr)
