"""Expands variables in paths that only a compute node knows, such as `$SLURM_TMPDIR` or `/lscratch/$SLURM_JOB_ID`.

Standard library only: this also runs on the node's own Python, outside a container.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import os
import re
from pathlib import Path

from conf.errors import ConfigError, Problem

VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
"""`$NAME` or `${NAME}`. Nothing else is expanded, in particular no `$(command)`."""


def names(text: str) -> list[str]:
    """Return the variables in a path."""
    return [match[1] or match[2] for match in VARIABLE.finditer(text)]


def is_clear(text: str) -> bool:
    """Return whether each `$` begins a variable, and nothing looks like a command."""
    return not set("$`") & set(VARIABLE.sub("", text))


def expanded(text: str, key: str) -> str:
    """Return a path with the values that its variables and `~` have on this node. `key` is its config key, for the message.

    Raises ConfigError if a variable is not set here.
    """
    values = {name: os.path.expandvars(f"${name}") for name in names(text)}
    for name, value in values.items():
        if value in ("", f"${name}"):  # an empty one would make another path of it
            message = f"{name} is not set on this node. Set it in cluster.setup, for example 'export {name}=/path', "
            raise ConfigError(Problem(key, text, message + "or write the path without a variable"))
    return str(Path(VARIABLE.sub(lambda match: values[match[1] or match[2]], text)).expanduser())


def in_shell(text: str) -> str:
    """Return a shell word for a path: its variables are expanded by the shell, and all else is quoted."""
    parts, last = [], 0
    for match in VARIABLE.finditer(text):
        parts += [_quoted(text[last : match.start()]), f'"${{{match[1] or match[2]}}}"']
        last = match.end()
    return "".join([*parts, _quoted(text[last:])]) or "''"


def _quoted(text: str) -> str:
    if not text:
        return ""
    safe = re.fullmatch(r"[A-Za-z0-9_@%+=:./-]+", text)
    return text if safe else "'" + text.replace("'", "'\"'\"'") + "'"
