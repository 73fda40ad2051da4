"""Show every job of a run: state, step, verdict and last error. Exits with 1 when a job has failed."""

import argparse
import json
import sys
from dataclasses import asdict

from conf.plural import plural
from conf.visible import visible
from launcher.commands import ls
from launcher.commands.answers import exit_code
from launcher.commands.arguments import add_json, add_run
from launcher.run_folder import sweep_record
from launcher.status import pending, state, sweep, tables


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        return _sweep(options)
    jobs = state.job_states(options.run)
    waits = pending.reasons(jobs)
    if options.json:
        print(
            json.dumps(
                [asdict(job) | {"failed": job.failed, "waits_for": waits.get(job.name)} for job in jobs], indent=2
            )
        )
    else:
        tables.status(jobs, waits)
    return exit_code(options, jobs) or (1 if any(job.failed for job in jobs) else 0)


def _sweep(options: argparse.Namespace) -> int:
    """Show the runs of a sweep, as `ls` does, and the jobs that wait for the end of all trainings."""
    ls.execute(argparse.Namespace(folder=options.run, json=options.json))
    found = sweep.look(options.run)
    if not options.json:
        if waiting := len(sweep_record.runs(options.run)) - len(found.runs):
            print(f"not started: {plural(waiting, 'run')}")
        for name, job in found.later.items():
            print(f"{name} {job.job_id} of the best run: {job.state.lower()}")
        if best := sweep_record.best(options.run):
            print(visible(f"best {'so far ' if found.is_live else ''}{best.name}"))
    for note in dict.fromkeys(found.notes):
        print(f"{options.prog}: {note}", file=sys.stderr)
    return 2 if found.notes else 1 if found.failed else 0
