"""End every pending and running job of the run, without saving."""

import argparse

from conf.plural import plural
from launcher.commands.arguments import add_run
from launcher.status import state

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    print(f"cancelled {plural(len(state.cancel(options.run)), 'job')}")
    return 0
