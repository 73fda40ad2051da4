"""Reads the ids of jobs in arrays of Slurm; standard library only, as launcher/slurm.py."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
from collections.abc import Mapping

ID = re.compile(r"\d+(_\d+)?")
"""The id of a job, or of one task of an array. Such a task keeps its id when it is requeued."""
ARRAY = re.compile(r"(\d+)_\[([\d,-]+)(?::(\d+))?(?:%\d+)?\]")
"""Waiting tasks of an array as one line: 123_[2-7%2], 123_[1,3-5], 123_[0-8:2]."""


def tasks_of(job_id: str) -> list[str]:
    """Return the ids of the tasks that a line of Slurm stands for: `123_[0,2-3%2]` is 123_0, 123_2, 123_3."""
    match = ARRAY.fullmatch(job_id)
    if match is None:
        return [job_id]
    numbers: list[int] = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1, int(match[3] or 1))
    return [f"{match[1]}_{number}" for number in numbers]


def own_id(environ: Mapping[str, str]) -> str | None:
    """Return the id of the job around this process, as sbatch and `scontrol requeue` know it; None outside Slurm.

    A task of an array has a SLURM_JOB_ID of its own, which is not known before it starts.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")
