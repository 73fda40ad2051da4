"""End every pending and running job of the run or sweep, or those of one kind, without saving."""

import argparse

from conf.jobs import JOB_KINDS
from conf.plural import plural
from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.status import requests, sweep


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--job", choices=tuple(JOB_KINDS), help="only this one; Slurm also ends the jobs that wait for its result"
    )


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        count = sweep.cancel(options.run, options.job)
    else:
        count = len(requests.cancel(options.run, options.job))
    print(f"cancelled {plural(count, 'job')}")
    return 0
