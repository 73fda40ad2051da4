"""What every rank runs: sets its environment, runs the job, and records how it ended. submitit pickles `run` with two strings."""

import atexit
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from conf import resolve
from conf.errors import Stopped, UserError
from conf.jobs import JOB_KINDS
from conf.schema import Config
from launcher import environment, secret_names
from launcher.run_folder.status import COMPLETED, USER_ERROR
from launcher.supervise import attempt, rendezvous, watchdog
from launcher.supervise.error_classes import classify
from launcher.supervise.process_inspection import PIPE

log = logging.getLogger("launcher.supervise.worker")  # its name also where it is run as __main__

SHOWN = re.compile(
    "MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$|NODE_(RANK|WORLD_SIZE)$|NCCL_|GLOO_|MUSTER_|AXOLOTL_|DEEPSPEED_|ACCELERATE_|FSDP_|PARALLELISM_"
    "|TORCH|TRITON_|PYTORCH_|OMP_|HF_HUB|HF_HOME|SRUN_CPUS|CUDA_VISIBLE"
)
"""The variables that a rank's log shows."""


def run(job: str, config_path: str) -> None:
    """Run one rank of `job`. Leaves with exit code 2, without a traceback, for what the user can mend."""
    # imported here, so that the login node can pickle this function without the packages of the jobs
    from jobs import run as run_job
    from jobs.distributed import logs, stop_signals

    stop_signals.listen()  # first of all: submitit's own handler would requeue the job before it is saved
    try:
        config = resolve.load(Path(config_path))
    except UserError as error:  # the run folder is not known, so there is no place for a verdict
        print(f"muster: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    where = environment.ranks(os.environ)
    logs.set_up(where.rank)
    _prepare(config, job, where)
    folder, number = Path(config.run_dir) / "jobs" / job, int(os.environ.get("MUSTER_ATTEMPT", "1"))
    note = partial(attempt.record, folder, number, where.rank)
    started = time.time()
    if not JOB_KINDS[job].resumable:
        stop_signals.leave_at_once(note)
    try:
        with _watched(config, folder / f"attempt-{number}", where) if JOB_KINDS[job].distributed else nullcontext():
            run_job(job, config_path)
    except Stopped as error:
        note(error.status, str(error))
        log.info(str(error))
        if where.rank == 0:
            cluster = config.cluster
            attempt.adopt(folder, number, where.world_size, cluster.max_restarts if cluster.requeue else None)
        sys.exit(3)
    except UserError as error:
        note(USER_ERROR, str(error))
        log.error(str(error))
        sys.exit(error.exit_code)
    except BaseException as error:
        status, remedy = classify(error)
        note(status, f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc(), remedy=remedy)
        raise
    if where.rank == 0:
        note(COMPLETED, seconds=round(time.time() - started, 2))
    if where.world_size > 1:
        atexit.register(_leave)


@contextmanager
def _watched(config: Config, folder: Path, where: environment.Ranks) -> Iterator[None]:
    """Mark meanwhile how far this rank is; the first of a node starts the process that looks at the marks."""
    from jobs.distributed import heartbeat

    local = watchdog.folder(config.cluster.scratch, folder, where.node_rank)
    try:
        local.mkdir(parents=True, exist_ok=True)
        heartbeat.listen(local, where.rank, attempt.host())
        values = environment.watch_variables(config, str(local / PIPE))
        environment.apply({key: value for key, value in values.items() if key not in os.environ})
        if where.local_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            watchdog.start(config, folder, where)
    except OSError as error:
        log.warning(f"nobody watches for hangs: cluster.scratch={config.cluster.scratch}: {error}")
    try:
        yield
    finally:
        heartbeat.close()


def _leave() -> None:
    """End a rank whose work is done before torch's threads are taken apart: now and then one aborts in that, srun then kills
    the other ranks, and a job that has done all it should ends as a failure (seen with Gloo: `terminate called`)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _prepare(config: Config, job: str, where: environment.Ranks) -> None:
    """Set this rank's variables, and show them in its log, but for secrets. What is set already stays."""
    caches = environment.cache_variables(config, os.getuid())
    values = where.variables() | {key: value for key, value in caches.items() if key not in os.environ}
    reason = "not needed"
    if where.world_size > 1 and JOB_KINDS[job].distributed:
        found = rendezvous.interface_to(os.environ["MASTER_ADDR"])
        interface, reason = environment.network_variables(config, found, os.environ)
        values |= interface
    path = Path(config.cluster.secrets_file).expanduser()
    values |= environment.secrets(config, os.environ, path.read_text(encoding="utf-8") if path.is_file() else "")
    environment.apply(values)
    hidden = {name for name in os.environ if name in config.cluster.secrets or secret_names.is_secret(name)}
    shown = {name: value for name, value in sorted(os.environ.items()) if SHOWN.match(name) and name not in hidden}
    log.info(f"network interface {reason}\nenvironment {json.dumps(shown)}")


if __name__ == "__main__":
    run(*sys.argv[1:])
