"""Decides whether a stream shows colors. The only place in Muster that knows color codes."""

from typing import TextIO

GREEN, RESET = "\033[32m", "\033[0m"


def supports_color(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colors (TERM is not dumb), and NO_COLOR does not turn them off.

    A job's log is a file, so it never has color codes, and no other terminal that shows it later must understand them.
    """
    if not stream.isatty():
        return False
    from rich.console import Console  # takes time, and a job needs it only in a terminal

    console = Console(file=stream)
    return console.color_system is not None and not console.no_color
