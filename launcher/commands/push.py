"""Push the consolidated model to the Hub: hub.push=owner/name, if the run has none. Run it where there is a network."""

import argparse

from launcher.commands import run
from launcher.commands.arguments import add_overrides, add_run
from launcher.commands.best import best_of


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_overrides(parser)


def execute(options: argparse.Namespace) -> int:
    return run.launch(
        [f"resume={best_of(options.run)}", "pipeline=push", *options.overrides], prog=f"{options.prog} push"
    )
