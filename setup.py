"""Adds to a wheel what `muster` runs. Everything else about the package stands in pyproject.toml.

The code goes into muster/_bundle, not to the top level of site-packages: other packages and users' projects have a `conf`
or a `launcher` of their own.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUNDLED = ("conf", "pages", "launcher", "jobs", "slurm_templates", "examples", "launch.py")


class BuildWithBundle(build_py):
    """Copies the code beside the package `muster`, with the commit that it was built from."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the command then runs the clone itself
            return
        bundle = Path(self.build_lib) / "muster" / "_bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir(parents=True)
        for name in BUNDLED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, bundle / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy2(ROOT / name, bundle / name)
        (bundle / "COMMIT").write_text(commit() + "\n", encoding="utf-8")


def commit() -> str:
    """The commit of the clone, with `-dirty` where files differ from it; empty where this is no clone."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


setup(cmdclass={"build_py": BuildWithBundle})
