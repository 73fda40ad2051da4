"""End every pending and running job of the run, or one of them, without saving."""

import argparse

from conf.jobs import JOB_KINDS
from conf.plural import plural
from launcher.commands.arguments import add_run
from launcher.status import requests


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--job", choices=tuple(JOB_KINDS), help="only this one; Slurm also ends the jobs that wait for its result"
    )


def execute(options: argparse.Namespace) -> int:
    print(f"cancelled {plural(len(requests.cancel(options.run, options.job)), 'job')}")
    return 0
