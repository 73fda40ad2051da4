"""Start the jobs that have not completed. Training continues from the newest complete checkpoint."""

import argparse

from launcher.commands import run
from launcher.commands.arguments import add_overrides, add_run


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_overrides(parser)


def execute(options: argparse.Namespace) -> int:
    return run.launch([f"resume={options.run}", *options.overrides], prog=f"{options.prog} resume")
