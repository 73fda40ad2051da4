"""Copies Muster's code into the run folder, and records its commit: a queued job must not change when the clone changes."""

import shutil
from pathlib import Path
from typing import Any

from conf.files import partial, sync_tree, write_text
from launcher.version import git

COPIED_FOLDERS = ("conf", "launcher", "jobs", "slurm_templates")


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
    """Return the clone's commit and whether files differ from it; empty without git. Writes the diff to RUN/code.diff."""
    commit, diff = git(clone, "rev-parse", "HEAD"), git(clone, "diff", "HEAD")
    write_text(run / "code.diff", diff or "")
    return {"commit": commit, "modified": bool(diff)} if commit else {}
