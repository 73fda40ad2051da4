"""Tells which scripts of a run wait for the user to submit them (`submit=script`), and the command for it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import slurm
from launcher.run_folder import record
from launcher.status.state import JobState


def not_submitted(run: Path, launches: Sequence[dict[str, Any]], jobs: Sequence[JobState]) -> dict[str, str]:
    """Return the jobs whose scripts wait for the user, and the command that submits each."""
    live = {job.name for job in jobs if job.state in slurm.LIVE_STATES}
    names = [name for name in record.not_submitted(run, launches) if name not in live]
    return {name: f"sbatch {shlex.quote(str(run / 'jobs' / f'{name}.sbatch'))}" for name in names}


def submit_command(run: Path, waiting: Mapping[str, str]) -> str:
    """Return the command that submits all jobs of `not_submitted`; empty if there are none."""
    if len(waiting) > 1:
        return f"bash {shlex.quote(str(run / 'jobs' / 'submit.sh'))}"
    return next(iter(waiting.values()), "")
