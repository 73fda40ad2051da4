"""Show every job of runs: state, step, times, verdict and last error. Exits with 1 when a job has failed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from launcher.commands.answers import exit_code
from launcher.commands.arguments import RUN_OR_ID, add_json
from launcher.status import find, overview, status_table, watch


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=RUN_OR_ID)
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--watch", action="store_true", help="again and again, until no job is pending or running")
    parser.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="with --watch: how often to ask Slurm; default: 10"
    )


def execute(options: argparse.Namespace) -> int:
    runs = list(dict.fromkeys(map(find.run_of, options.runs)))
    if options.watch:
        return _exit_code(options, watch.watch(runs, options.every))
    found = overview.read(runs)
    if options.json:
        print(json.dumps([job for item in found for job in item.records()], indent=2))
    else:
        status_table.show(found)
    return _exit_code(options, found)


def _exit_code(options: argparse.Namespace, found: Sequence[overview.Overview]) -> int:
    return exit_code(options, [job for item in found for job in item.jobs]) or int(any(item.failed for item in found))
