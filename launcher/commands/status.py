"""Show every job of a run: state, step, verdict and last error. Exits with 1 when a job has failed."""

import argparse
import json
from dataclasses import asdict

from launcher.commands.answers import exit_code
from launcher.commands.arguments import add_json, add_run
from launcher.status import pending, state, tables


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_json(parser)


def execute(options: argparse.Namespace) -> int:
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
