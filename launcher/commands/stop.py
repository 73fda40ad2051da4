"""Save a checkpoint at the next training step, then end training, or all trainings of a sweep. Only `resume` starts it again."""

import argparse

from conf.plural import plural
from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.status import requests, sweep

arguments = add_run


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        asked, cancelled = sweep.stop(options.run)
        print(
            f"{plural(asked, 'training')} will save and end; {plural(cancelled, 'job')} that had not begun cancelled."
        )
        print(f"To see when they have: muster status {options.run}")
        return 0
    requests.stop(options.run)
    print(f"training will save at its next step and end. To see when it has: muster status {options.run}")
    return 0
