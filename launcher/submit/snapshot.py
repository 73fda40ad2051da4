"""Copies Muster's code into the run folder, and records its commit: a queued job must not change when the clone changes."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from conf.files import partial, sync_tree, write_text

COPIED_FOLDERS = ("conf", "launcher", "jobs", "slurm_templates")


def copy_code(clone: Path, run: Path) -> None:
    """Copy the clone's code to RUN/code. An older copy is replaced as a whole."""
    target = run / "code"
    new = partial(target)
    shutil.rmtree(new, ignore_errors=True)
    for name in COPIED_FOLDERS:
        shutil.copytree(clone / name, new / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    sync_tree(new)
    if target.exists():  # a folder cannot be renamed onto one that has files
        old = target.with_name(".code.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    new.rename(target)


def provenance(clone: Path, run: Path) -> dict[str, Any]:
    """Return the clone's commit and whether files differ from it; empty without git. Writes the diff to RUN/code.diff."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(clone), *words], capture_output=True, text=True, timeout=30, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD")
    write_text(run / "code.diff", diff or "")
    return {"commit": commit, "modified": bool(diff)} if commit else {}
