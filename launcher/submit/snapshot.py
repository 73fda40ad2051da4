"""Copies Muster's code into the run, so that a queued job cannot change under the user, and records which code it was."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from conf.files import partial, sync_tree, write_text

PARTS = ("conf", "launcher", "jobs", "slurm_templates")


def take(clone: Path, run: Path) -> None:
    """Make RUN/code a copy of the clone's code, replacing an older one."""
    target = run / "code"
    beside = partial(target)
    shutil.rmtree(beside, ignore_errors=True)
    for part in PARTS:
        shutil.copytree(clone / part, beside / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    sync_tree(beside)
    if target.exists():
        old = target.with_name(".code.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    beside.rename(target)


def provenance(clone: Path, run: Path) -> dict[str, Any]:
    """Commit of the clone; what differs from it goes into RUN/code.diff. Empty where there is no git."""

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
