"""Show why each job waits or how it failed: the first error, the remedy, and what happens next."""

import argparse
from pathlib import Path

from conf.visible import visible
from launcher.commands.answers import exit_code
from launcher.commands.arguments import add_run
from launcher.run_folder import sweep_record
from launcher.status import pending, state, status_table


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, by_id=True)


def execute(options: argparse.Namespace) -> int:
    if not sweep_record.is_sweep(options.run):
        return _explain(options, options.run)
    codes = [0]
    for run in sweep_record.runs(options.run):
        print(visible(f"==== {run.name}"))
        if (run / "run.json").is_file():
            codes.append(_explain(options, run))
        else:
            print("not started")
    return max(codes)


def _explain(options: argparse.Namespace, run: Path) -> int:
    jobs = state.job_states(run)
    waits = pending.reasons(jobs)
    for job in jobs:
        if job.state == "PENDING":
            status_table.outcome(
                f"{job.name} {job.job_id}", "pending", f": {waits.get(job.name, 'Slurm does not say why')}"
            )
        elif job.verdict is None or job.verdict["status"] == "completed":
            reason = f": {job.verdict['reason']}" if job.verdict and job.verdict.get("reason") else ""
            word = job.verdict["status"] if job.verdict else job.state.lower()
            status_table.outcome(f"{job.name} {job.job_id}", word, reason)
        status_table.attempts(job)
    return exit_code(options, jobs)
