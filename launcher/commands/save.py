"""Save a checkpoint at the next training step, and go on training; in a sweep, of each run that trains."""

import argparse

from conf.plural import plural
from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.status import requests, sweep

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        print(f"{plural(sweep.save(options.run), 'training')} will save at the next step and go on")
        return 0
    requests.save(options.run)
    print(f"training will save at its next step and go on. The checkpoint appears in {options.run / 'checkpoints'}")
    return 0
