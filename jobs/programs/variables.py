"""The environment of the user's program: that of the job, without what belongs to Muster's own ranks. Pure."""

from collections.abc import Mapping
from pathlib import Path

from conf.choices import ProgramLauncher
from conf.schema import Config
from jobs.programs.command import LOG_PREFIX

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "NODE_WORLD_SIZE")
"""torchrun sets them for each of its ranks."""


def program_variables(config: Config, environ: Mapping[str, str], attempt: Path, local: Path) -> dict[str, str]:
    """Return the environment of the program. `attempt` is the attempt's folder, `local` a folder on the node's own disk.

    Without PYTHONSAFEPATH, a script can import the files beside it. Of Muster's code it sees the package `muster` alone.
    """
    code = f"{config.run_dir}/code"
    entries = [entry for entry in environ.get("PYTHONPATH", "").split(":") if entry not in ("", code)]
    values = {name: value for name, value in environ.items() if name != "PYTHONSAFEPATH"}
    values |= {
        "PYTHONPATH": ":".join([f"{code}/for_programs", *entries]),
        "MUSTER_CHECKPOINTS": f"{config.run_dir}/checkpoints",
        "MUSTER_STOP_FILE": str(attempt / "stop"),
        "MUSTER_BEATS": str(local / "beats"),
        "MUSTER_LOCAL": str(local),
        "PYTHONFAULTHANDLER": "1",  # see processes.abort_ranks
    }
    if config.custom.launcher is not ProgramLauncher.srun:
        values = {name: value for name, value in values.items() if name not in OF_A_RANK}
        values["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = f"[{LOG_PREFIX}${{rank}}]:"
    if config.custom.launcher is ProgramLauncher.ray:
        values = _of_ray(config, attempt / "ray") | values
    return values


def _of_ray(config: Config, shared: Path) -> dict[str, str]:
    """Return the variables that Ray reads, unless the user has set them. `shared` is a folder that all nodes see."""
    train, timeout_s = config.cluster.train, str(config.cluster.network.nccl_timeout_s)
    return {
        "MUSTER_RANKS": str(train.ranks),
        "MUSTER_SHARED": str(shared),
        "RAY_DEDUP_LOGS": "0",  # each rank has a log of its own
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise a line that a worker prints appears twice
        "RAY_worker_niceness": "0",  # 15 by default: workers would wait for every other program of a node
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the program has ended: nothing waits for this node
        # by default half a minute and a minute, too short for imports from a network file system
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": timeout_s,
        "RAY_worker_register_timeout_seconds": timeout_s,
        # without a token, every user of the cluster could run code in this job
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(shared / "token"),
    }
