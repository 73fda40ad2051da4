"""The statuses that an attempt can end with, as written to attempt-N.json."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

COMPLETED = "completed"
PREEMPTED = "preempted"
TIME_LIMIT = "time_limit"
STOPPED = "stopped"
FAILED = "failed"
OUT_OF_MEMORY = "out_of_memory"
NCCL = "nccl"
HANG = "hang"
BAD_NODE = "bad_node"
USER_ERROR = "user_error"
NO_PROGRESS = "no_progress"

PLANNED = (PREEMPTED, TIME_LIMIT, STOPPED)
"""Ends that Slurm or the user asked for. The ranks saved their work first, if there was time."""
