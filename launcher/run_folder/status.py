"""The statuses that an attempt can end with, as written to attempt-N.json."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

COMPLETED, PREEMPTED, TIME_LIMIT, STOPPED, FAILED = "completed", "preempted", "time_limit", "stopped", "failed"


OUT_OF_MEMORY, NCCL, HANG, BAD_NODE, USER_ERROR, NO_PROGRESS = (
    "out_of_memory",
    "nccl",
    "hang",
    "bad_node",
    "user_error",
    "no_progress",
)


PLANNED = (PREEMPTED, TIME_LIMIT, STOPPED)
"""Ends that somebody asked for: the work was saved first."""
