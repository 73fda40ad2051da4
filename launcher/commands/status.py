"""Show every job of runs: state, step, times, verdict and last error. Exits with 1 when a job has failed."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.commands.answers import exit_code
from launcher.commands.arguments import RUN_OR_ID, add_every, add_json
from launcher.run_folder import sweep_record
from launcher.status import find, overview, status_table, sweep, sweep_table, watch


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"{RUN_OR_ID}; or a sweep's folder")
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--watch", action="store_true", help="again and again, until no job is pending or running")
    add_every(parser, "with --watch: ")


def execute(options: argparse.Namespace) -> int:
    folders = list(dict.fromkeys(map(find.run_of, options.runs)))
    sweeps = [folder for folder in folders if sweep_record.is_sweep(folder)]
    if options.watch:
        found = watch.watch(folders, options.every)
    elif options.json:
        found = overview.read(find.each_run(folders))
        print(json.dumps([job for item in found for job in item.records()], indent=2))
    else:
        found = overview.read([folder for folder in folders if folder not in sweeps])
        status_table.show(found)
    return max([_exit_code(options, found), *(_sweep(options, folder) for folder in sweeps)])


def _exit_code(options: argparse.Namespace, found: Sequence[overview.Overview]) -> int:
    return exit_code(options, [job for item in found for job in item.jobs]) or int(any(item.failed for item in found))


def _sweep(options: argparse.Namespace, folder: Path) -> int:
    """Show a sweep, unless --json has shown its runs. Returns its part of the exit code."""
    found = sweep.look(folder)
    if not options.json:
        sweep_table.show(folder, found)
    for note in dict.fromkeys(found.notes):
        print(f"{options.prog}: {note}", file=sys.stderr)
    return 2 if found.notes else int(bool(found.failed))
