"""Reads `cluster.secrets_file`: lines NAME=value, as a shell or a .env file has them, in a file that only its owner can read."""

import os
import re
import stat
from pathlib import Path

from conf.errors import Problem, SiteError
from conf.schema import Config

LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=(.*)", re.DOTALL)
EXPANDED = re.compile(r"\$[A-Za-z_({]|`")
"""What a shell would replace in a value without single quotes."""
MAX_BYTES = 2**20
KEY = "cluster.secrets_file"


def names(config: Config) -> list[str]:
    """The variables whose values the jobs take from the environment or from this file: `cluster.secrets` and `hub.token`."""
    return [*config.cluster.secrets, *([config.hub.token] if config.hub.token else [])]


def read(path: Path) -> tuple[str, str]:
    """The text of a file, and a warning if others may read it: the launch refuses that, a job only says so.

    Both are empty if there is no such file. Raises SiteError if others may write it, if it is no text, or larger than MAX_BYTES.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return "", ""
    except OSError as error:
        raise SiteError(Problem(KEY, path, f"cannot be read: {error.strerror}. Type chmod 600 {path}")) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SiteError(Problem(KEY, path, "is not a file. Write lines NAME=value into a file"))
        if status.st_uid not in (os.geteuid(), 0):
            raise SiteError(
                Problem(KEY, path, "belongs to another user, who could change it. Copy it, and use the copy")
            )
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise SiteError(Problem(KEY, path, "is larger than 1 MiB. Name a file that has only lines NAME=value"))
    warning = f"others may read or write it (mode {stat.S_IMODE(status.st_mode):o}). Type chmod 600 {path}"
    if status.st_mode & 0o022:
        raise SiteError(Problem(KEY, path, warning))
    return _decoded(path, content), warning if status.st_mode & 0o077 else ""


def _decoded(path: Path, content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark, as editors on Windows write it."""
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        message = f"line {number} is not text in UTF-8. Save the file as UTF-8"
        raise SiteError(Problem(KEY, path, message)) from None


def parse(path: Path, text: str) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """(values, lines of another form) of lines NAME=value, `export NAME=value` and NAME="value".

    Blank lines and those that begin with # are left out. No message shows a value.
    """
    values, problems = dict[str, str](), list[Problem]()
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        value, reason = (
            _value(match[2].strip())
            if match
            else ("", "is not of the form NAME=value. Complete it, or put # before it")
        )
        if match and not reason:
            values[match[1]] = value
        else:
            name = f" ({match[1]})" if match else ""
            problems.append(Problem(KEY, path, f"line {number}{name} {reason}"))
    return values, tuple(problems)


def _value(text: str) -> tuple[str, str]:
    """(the value, why it cannot be read), without quotes around it and without a comment after it."""
    quote = text[:1] if text[:1] in ("'", '"') else ""
    value = text
    if quote:
        body = r"[^']*" if quote == "'" else r'(?:[^"\\]|\\.)*'
        match = re.fullmatch(f"{quote}({body}){quote}(\\s+#.*)?", text)
        if match is None:
            return "", "has a quote that is not closed, or text after it. Put the whole value into single quotes"
        value = match[1] if quote == "'" else re.sub(r'\\(["\\$`])', r"\1", match[1])
    elif re.search(r"\s#", text):
        return "", "has a blank and # in its value. Put the value into single quotes"
    if quote != "'" and EXPANDED.search(text.replace("\\$", "").replace("\\`", "") if quote else text):
        return "", "has $ or `, which is not replaced here. Write the value itself, in single quotes"
    if not value:
        return "", "has no value. Write NAME=value, or remove the line"
    if not value.isprintable():
        return "", "has a control character in its value. Write the value again"
    return value, ""
