"""Launch a run with the settings KEY=VALUE..., like launch.py. Without arguments: the demo on this machine."""

import argparse
from collections.abc import Sequence


def arguments(parser: argparse.ArgumentParser) -> None:
    """None: Hydra reads them, see launcher/__main__.py."""


def execute(options: argparse.Namespace) -> int:
    return launch([], prog=f"{options.prog} run")


def launch(words: Sequence[str], prog: str) -> int:
    """Launch a run. Hydra reads all words, also --help."""
    import launch  # imports Hydra and submitit; the other commands start faster without them

    return launch.main(words, prog)
