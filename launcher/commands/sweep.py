"""Launch one run for each combination of values, in one folder: KEY=a,b KEY2=c,d and any other KEY=VALUE."""

import argparse
from collections.abc import Sequence

from launcher.commands import run


def arguments(parser: argparse.ArgumentParser) -> None:
    """None: Hydra reads them, see launcher/__main__.py."""


def execute(options: argparse.Namespace) -> int:
    return launch([], prog=f"{options.prog} sweep")


def launch(words: Sequence[str], prog: str) -> int:
    """Launch a sweep: `run` with -m."""
    return run.launch(["-m", *words], prog)
