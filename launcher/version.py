"""Which Muster this is: its version, and the commit of its code."""

import subprocess
from pathlib import Path

from muster import __version__


def git(clone: Path, *words: str) -> str | None:
    """What a git command prints in the clone; None where there is no git, no clone, or the command fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(clone), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a file may have another encoding
            timeout=30,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(code: Path) -> str | None:
    """The commit of the code, with `-dirty` where files differ from it. A wheel holds it in the file COMMIT."""
    if (code / "COMMIT").is_file():
        return (code / "COMMIT").read_text(encoding="utf-8").strip() or None
    if not (code / ".git").exists():  # a copy inside somebody else's repository would name that one's commit
        return None
    return git(code, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def text(code: Path) -> str:
    """For `--version`: `muster 0.1.0 (commit 0123abc)`."""
    identifier = commit(code)
    return f"muster {__version__}" + (f" (commit {identifier})" if identifier else "")
