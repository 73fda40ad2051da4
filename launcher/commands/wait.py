"""Wait until no job of the run is pending or running. Exits with 0 if all have completed, else with 1."""

import argparse
import time

from conf.visible import visible
from launcher import slurm
from launcher.commands.arguments import add_every, add_run
from launcher.run_folder import lock, sweep_record
from launcher.status import listing, state, sweep


def arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, by_id=True)
    add_every(parser)


def execute(options: argparse.Namespace) -> int:
    if sweep_record.is_sweep(options.run):
        while (found := sweep.look(options.run)).is_live or found.notes:
            time.sleep(options.every)
        for run, jobs in found.runs.items():
            print(visible(f"{run.name} {listing.overall(jobs, is_held=False)}"))
        return 1 if found.failed or not all(map(sweep_record.has_ended, sweep_record.runs(options.run))) else 0
    said: set[str] = set()
    while True:
        jobs = state.job_states(options.run)
        is_silent = any(job.is_silent for job in jobs)
        is_live = any(job.state in slurm.LIVE_STATES for job in jobs) or lock.holder(options.run) is not None
        for job in jobs:
            if job.verdict and job.state not in slurm.LIVE_STATES and job.name not in said:
                print(visible(f"{job.name} {job.job_id} {job.verdict['status']}"), flush=True)
                said.add(job.name)
        if not (is_live or is_silent):
            return 0 if jobs and all(job.verdict and not job.failed for job in jobs) else 1
        time.sleep(options.every)
