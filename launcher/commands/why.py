"""Show why each job waits or how it failed: the first error, the remedy, and what happens next."""

import argparse

from launcher.commands.answers import exit_code
from launcher.commands.arguments import add_run
from launcher.status import pending, state, status_table


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, by_id=True)


def execute(options: argparse.Namespace) -> int:
    jobs = state.job_states(options.run)
    waits = pending.reasons(jobs)
    for job in jobs:
        if job.state == "PENDING":
            status_table.outcome(
                f"{job.name} {job.job_id}", "pending", f": {waits.get(job.name, 'Slurm does not say why')}"
            )
        elif job.verdict is None or job.verdict["status"] == "completed":
            status_table.outcome(
                f"{job.name} {job.job_id}", job.verdict["status"] if job.verdict else job.state.lower()
            )
        status_table.attempts(job)
    return exit_code(options, jobs)
