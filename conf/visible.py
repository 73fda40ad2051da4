"""Shows the characters of a text on which a terminal would act, instead of sending them to it."""

from __future__ import annotations  # the node's own Python 3.9 runs this too, outside the container

import re

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (ESC, BEL, C1, ...) except tab and end of line, characters that reverse the direction of what follows,
separators that not every reader takes for the end of a line, and halves of characters, which cannot be printed."""


def visible(text: str) -> str:
    """Return `text` with such characters as they are written in Python, for example `\\u202e`.

    Texts of users, models, logs and Slurm go through this before they are printed. Otherwise, an answer or a row could
    set the clipboard or the title, hide lines, or make a link. A carriage return without a line feed starts a new line, because
    progress bars use it to write over the last one.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return HIDDEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
