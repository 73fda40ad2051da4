"""What commands return when Slurm does not answer."""

import argparse
import sys
from collections.abc import Sequence

from launcher.status import state


def exit_code(options: argparse.Namespace, jobs: Sequence[state.JobState]) -> int:
    """Print why the state of a job is unknown. Returns 2 if Slurm did not answer, else 0."""
    notes = {job.note: job for job in jobs if job.note}
    for note, job in notes.items():
        print(f"{options.prog}: {job.name}: state unknown: {note}", file=sys.stderr)
    return 2 if any(job.is_silent for job in jobs) else 0
