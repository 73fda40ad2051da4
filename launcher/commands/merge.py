"""Consolidate the newest checkpoint into RUN/model. For an older one: consolidate.step=500."""

import argparse

from launcher.commands import run
from launcher.commands.arguments import add_overrides, add_run
from launcher.commands.best import best_of


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_overrides(parser)


def execute(options: argparse.Namespace) -> int:
    return run.launch(
        [f"resume={best_of(options.run)}", "pipeline=consolidate", *options.overrides], prog=f"{options.prog} merge"
    )
