"""Copies Muster's code into the run folder, and records its commit: a queued job must not change when the clone changes."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.files import partial, sync_tree, write_text
from launcher.check import observe
from launcher.secret_names import MASK, found
from launcher.version import git

COPIED_FOLDERS = ("conf", "pages", "launcher", "jobs", "slurm_templates")
HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+(\d+)")
LISTED_LINES = 5
BEGIN_KEY, END_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"), re.compile(r"-----END [A-Z ]*PRIVATE KEY")


def copy_code(clone: Path, run: Path) -> None:
    """Copy the clone's code to RUN/code. An older copy is replaced as a whole.

    RUN/code/for_programs holds what a program of the user can import: `muster` alone, because the program may have a package
    `conf` or `jobs` of its own.
    """
    target = run / "code"
    new = partial(target)
    shutil.rmtree(new, ignore_errors=True)
    for name in COPIED_FOLDERS:
        shutil.copytree(clone / name, new / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    package = clone.parent if clone.name == "_bundle" else clone / "muster"  # in a wheel, the package holds the code
    shutil.copytree(
        package, new / "for_programs" / "muster", ignore=lambda _, names: [n for n in names if not n.endswith(".py")]
    )
    sync_tree(new)
    if target.exists():  # a folder cannot be renamed onto one that has files
        old = target.with_name(".code.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    new.rename(target)


def provenance(clone: Path, run: Path) -> dict[str, Any]:
    """Return the clone's commit and whether files differ from it; empty without git. Writes the diff to RUN/code.diff.

    Secrets in the diff are hidden, and the lines that have them are named on stderr. Their copies in RUN/code are made private.
    """
    commit, diff = git(clone, "rev-parse", "HEAD"), git(clone, "diff", "--no-ext-diff", "--no-textconv", "HEAD")
    masked, places = mask_diff(diff or "")
    write_text(run / "code.diff", masked)
    if places:
        shown = ", ".join(f"{path} line {number}" for path, number in places[:LISTED_LINES])
        more = f" and {len(places) - LISTED_LINES} more" if len(places) > LISTED_LINES else ""
        message = f"what looks like a secret is hidden in code.diff: {shown}{more}. Keep secrets outside the clone"
        print(f"muster: {message}", file=sys.stderr)
    for path in {run / "code" / name for name, _ in places}:
        if path.is_file():
            path.chmod(0o600)
    return {"commit": commit, "modified": diff is None or bool(diff)} if commit else {}


def mask_diff(diff: str) -> tuple[str, list[tuple[str, int]]]:
    """A diff without its secrets, and (file, line in the new file) of each. The lines of a private key are hidden as a whole."""
    lines, places = [], []
    known = observe.secrets_of_environment()
    for path, number, line in _lines(diff):
        secrets = [secret for _, secret in found(line, known, is_code=True)]
        if path is None:  # the body of a private key
            lines.append(line[:1] + MASK)
            continue
        for secret in sorted(secrets, key=len, reverse=True):
            line = line.replace(secret, MASK)
        if secrets:
            places.append((path, number))
        lines.append(line)
    return "\n".join(lines), places


def _lines(diff: str) -> Iterator[tuple[str | None, int, str]]:
    """(file, line of the new file, text) of each line of a diff; None as the file for a line inside a private key."""
    path, number, in_key = "", 0, False
    for line in diff.split("\n"):
        in_key = in_key and not line.startswith(("diff ", "@@ "))
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ").removeprefix("b/")
        elif match := HUNK.match(line):
            number = int(match[1]) - 1
        elif not line.startswith("-"):
            number += 1
        yield (None if in_key and not END_KEY.search(line) else path), number, line
        in_key = bool(in_key or BEGIN_KEY.search(line)) and not END_KEY.search(line)
