"""End every pending and running job of the run, without saving."""

import argparse

from conf.plural import plural
from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.status import state, sweep

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        print(f"cancelled {plural(sweep.cancel(options.run), 'job')}")
        return 0
    print(f"cancelled {plural(len(state.cancel(options.run)), 'job')}")
    return 0
