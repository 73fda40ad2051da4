"""Runs one rank of a job: sets its environment, runs the job, and records how it ended. submitit pickles `run`."""

import atexit
import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from conf import resolve
from conf.errors import ProgramFailed, Stopped, UserError
from conf.jobs import JOB_KINDS
from conf.schema import Config
from launcher import environment, secret_names, secrets_file
from launcher.run_folder.status import COMPLETED, USER_ERROR
from launcher.supervise import allocation, attempt, private_folder, rendezvous, watchdog
from launcher.supervise.error_classes import classify
from launcher.supervise.process_inspection import PIPE
from launcher.supervise.program_failure import status_and_remedy

log = logging.getLogger("launcher.supervise.worker")  # not __name__, which is __main__ in a script submitted by hand

LOGGED_VARIABLES = re.compile(
    "MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$|NODE_(RANK|WORLD_SIZE)$|NCCL_|GLOO_|MUSTER_|AXOLOTL_|DEEPSPEED_|ACCELERATE_|FSDP_|PARALLELISM_"
    "|TORCH|TRITON_|PYTORCH_|OMP_|HF_HUB|HF_HOME|SRUN_CPUS|CUDA_VISIBLE"
)
"""Names of the variables that a rank writes to its log."""


def run(job: str, config_path: str) -> None:
    """Run one rank of `job`, and exit: 2 for an error that the user can fix (no traceback), 3 after a planned stop."""
    # Imported here, so that the login node can pickle this function without the packages of the jobs.
    from jobs import run as run_job
    from jobs.distributed import logs, stop_signals

    stop_signals.install_handlers()  # first of all: submitit's own signal handler would requeue the job before it has saved
    config = _load_config(Path(config_path))
    rank_info = environment.read_rank_info(os.environ)
    logs.set_up(rank_info.rank)
    folder, number = Path(config.run_dir) / "jobs" / job, int(os.environ.get("MUSTER_ATTEMPT", "1"))
    started = time.time()
    record_end = partial(attempt.record_end, folder, number, rank_info.rank)
    if not JOB_KINDS[job].resumable:
        stop_signals.exit_on_signal(record_end)
    watched = JOB_KINDS[job].distributed
    try:
        _set_environment(config, job, rank_info)
        with _heartbeats(config, folder / f"attempt-{number}", rank_info) if watched else nullcontext():
            run_job(job, config_path)
    except Stopped as error:
        record_end(error.status, str(error), cpu_s=_cpu_s())
        log.info(str(error))
        if rank_info.rank == 0:
            max_restarts = config.cluster.max_restarts if config.cluster.requeue else None
            attempt.finish_for_killed_script(folder, number, rank_info.world_size, max_restarts)
        sys.exit(3)
    except UserError as error:
        record_end(USER_ERROR, str(error))
        log.error(str(error))
        sys.exit(error.exit_code)
    except ProgramFailed as error:
        _record_failed_program(error, folder, number)
        sys.exit(1)
    except BaseException as error:
        status, remedy = classify(error)
        record_end(status, f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc(), remedy=remedy)
        raise
    if rank_info.rank == 0:
        record_end(COMPLETED, seconds=round(time.time() - started, 2), cpu_s=_cpu_s())
    if rank_info.world_size > 1:
        atexit.register(_exit_at_once)


def _cpu_s() -> float:
    """Return the CPU seconds of this rank, and of the processes that it has started and that have ended."""
    return round(sum(os.times()[:4]), 2)


def _record_failed_program(error: ProgramFailed, folder: Path, number: int) -> None:
    """Record the failure of the user's own program, whose traceback is in its log."""
    status, remedy = status_and_remedy(error.exception, str(error))
    attempt.record_end(folder, number, error.rank, status, str(error), error.trace, remedy=remedy)
    log.error(str(error))


def _load_config(path: Path) -> Config:
    """Load the run's config. Exits without a verdict on an error, because the run folder is unknown without a config."""
    try:
        return resolve.load(path)
    except UserError as error:
        print(f"muster: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


@contextmanager
def _heartbeats(config: Config, folder: Path, rank_info: environment.RankInfo) -> Iterator[None]:
    """Write heartbeats of this rank during the block; the first rank of a node also starts the node's watchdog.

    `folder` is the attempt's folder. If the node's own disk cannot be used, logs a warning and runs without.
    """
    from jobs.distributed import heartbeat

    try:
        local = watchdog.heartbeat_folder(config.cluster.scratch, folder, rank_info.node_rank)
        local.mkdir(mode=0o700, exist_ok=True)
        heartbeat.start(local, rank_info.rank, allocation.host())
        values = environment.watchdog_variables(config, str(local / PIPE))
        environment.set_variables({key: value for key, value in values.items() if key not in os.environ})
        if rank_info.local_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            watchdog.start(config, folder, rank_info)
    except OSError as error:
        log.warning(f"cluster.scratch={config.cluster.scratch}: no watchdog, so hangs are not detected: {error}")
    try:
        yield
    finally:
        heartbeat.close()


def _exit_at_once() -> None:
    """Exit a rank whose work is done before torch destroys its threads.

    Now and then a rank aborts in that destruction (seen with Gloo: `terminate called`). srun then kills the other
    ranks, and a job that has done all its work ends as a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _caches(config: Config) -> dict[str, str]:
    """The folders of compiler caches, in a folder that only this user can write to: ranks run what lies in them.

    A variable that is set already keeps its value, unless others can write to the folder that it names. Raises SiteError if
    there is no private folder on `cluster.scratch`.
    """
    values = {}
    try:
        base = private_folder.make(config.cluster.scratch, os.getuid())
    except OSError:  # a full or read-only disk; the watchdog warns of it
        base = Path(tempfile.mkdtemp(prefix="muster-"))
    for name, path in environment.cache_variables(config, os.getuid()).items():
        given = os.environ.get(name)
        if given is None or not private_folder.is_private(Path(given), os.getuid()):
            values[name] = str(base / Path(path).name)
        if given is not None and name in values:
            log.warning(
                f"{name}={given} is not used: others can write to that folder, and could change what the ranks run"
            )
    return values


def _set_environment(config: Config, job: str, rank_info: environment.RankInfo) -> None:
    """Set this rank's variables, and log them without secrets. A variable that is already set keeps its value."""
    if JOB_KINDS[job].needs_hub and os.environ.get("SUBMITIT_EXECUTOR") == "local" and "$" in config.cluster.scratch:
        config.cluster.scratch = tempfile.gettempdir()  # on a login node there is no job whose disk this could be
    environment.expand_paths(config)
    own = {name: value for name, value in config.cluster.environment.items() if name != "PYTHONPATH"}
    environment.set_variables(own)  # once more: srun, a container or the attempt may have changed them
    values = rank_info.variables() | _caches(config)
    if config.cluster.hf_home and "HF_HOME" not in own:
        values["HF_HOME"] = config.cluster.hf_home
    cpus = len(os.sched_getaffinity(0))
    values |= environment.thread_variables(config, job, os.environ, cpus, rank_info.local_world_size)
    reason = "not needed"
    if rank_info.world_size > 1 and JOB_KINDS[job].distributed:
        interface = rendezvous.interface_to(os.environ["MASTER_ADDR"])
        network_values, reason = environment.network_variables(config, interface, os.environ)
        values |= network_values
    if secrets_file.names(config):
        secrets_text, warning = secrets_file.read(Path(config.cluster.secrets_file))
        values |= environment.secret_values(config, os.environ, secrets_text)
        if warning:
            log.warning(warning)
    environment.set_variables(values)
    hidden = {name for name in os.environ if name in secrets_file.names(config) or secret_names.is_secret(name)}
    shown = {
        name: secret_names.masked(value)
        for name, value in sorted(os.environ.items())
        if LOGGED_VARIABLES.match(name) and name not in hidden
    }
    log.info(f"network interface {reason}\nenvironment {json.dumps(shown)}")


if __name__ == "__main__":
    run(*sys.argv[1:])
