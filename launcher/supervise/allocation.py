"""Tells what a job's first node must know of its allocation: its name in Slurm, MASTER_ADDR, MASTER_PORT and the time to stop.

Standard library only: in a container job this runs outside the container, with the node's own python3.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import os
import socket
import time

from conf.errors import ConfigError, Problem
from launcher import hostlist, slurm, slurm_array
from launcher.supervise import rendezvous

WAIT_S = 120.0
"""How long the ranks wait for a Slurm that is busy, before they start without knowing the job's time limit."""


def host() -> str:
    """Return this node's name as Slurm knows it, so that the node can be excluded by that name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_port() -> int:
    return rendezvous.first_port(
        int(os.environ.get("SLURM_JOB_ID", os.getpid())), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    )


def master_address() -> str:
    """Return MASTER_ADDR: the first host of the allocation, or what the config asks for; 127.0.0.1 outside Slurm."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist or os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return "127.0.0.1"
    form = os.environ.get("MUSTER_MASTER_HOST")
    try:
        return rendezvous.master_address(hostlist.expand(nodelist), form, _node_address)
    except (OSError, UnicodeError) as error:
        message = f"does not resolve on {host()} ({error}). Set the name at which the other nodes reach this one"
        raise ConfigError(Problem("cluster.network: MASTER_ADDR", form, message)) from error


def _node_address(node: str) -> str | None:
    try:
        return slurm.node_address(node)
    except slurm.SlurmError:  # no scontrol on this node, or no answer
        return None


def stop_time(before_s: float) -> dict[str, str]:
    """Return MUSTER_STOP_AT: the Unix time at which the ranks save and stop, even if Slurm's signal does not reach them.

    It is `before_s` before the time limit, but never in the first half of the time: with a limit shorter than
    `before_s`, not a single step would run. Empty outside Slurm and for a job without a limit.
    """
    job_id = slurm_array.own_id(os.environ)
    if job_id is None:
        return {}
    try:
        with slurm.retrying(WAIT_S):
            left_s = slurm.seconds_left(job_id)
    except slurm.SlurmError:  # no squeue on this node, or no answer
        end = os.environ.get("SLURM_JOB_END_TIME", "")  # from Slurm 22.05 on
        left_s = float(end) - time.time() if end.isdecimal() else None
    return {} if left_s is None else {"MUSTER_STOP_AT": str(round(time.time() + max(left_s - before_s, left_s / 2)))}
