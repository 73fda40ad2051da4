"""Reads and writes RUN/run.json: each launch of a run with its command, code version and job ids."""

import math
import os
import pwd
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from conf import sweep
from conf.errors import Problem, RunError
from conf.files import write_json
from conf.jobs import JOB_KINDS
from conf.schema import Config
from launcher.run_folder.attempts import read_record

JOB_ID = re.compile(r"[0-9]{1,19}([_+][0-9]{1,10})?")
"""A job id of Slurm, also of a part of an array or a heterogeneous job."""
ANY = re.compile(r".*", re.DOTALL)
LOG = "_0_log.out"
"""After a job's id: the end of the name of its log."""
TIME = "%Y-%m-%dT%H:%M:%S%z"


class StartedJob(NamedTuple):
    """The newest start of a job."""

    job_id: str
    """Slurm's job id, or the process id of submitit's local controller."""
    cluster: str
    """Name of the executor: `slurm` or `local`."""
    slurm_name: str = ""
    """Slurm's name of the job; empty if it was not recorded."""
    folder: str = "code"
    """The folder in which the job starts, relative to the run."""


def training_rows(config: Config) -> int | None:
    """Return the rows of an epoch of a run whose data are prepared. None before that, and where samples are packed into rows."""
    described = read_record(Path(config.run_dir) / "data" / "data.json")
    train = (described or {}).get("train")
    rows = train.get("samples") if isinstance(train, dict) and not config.data.packing else None
    return rows if isinstance(rows, int) else None


def read_launches(run: Path) -> list[dict[str, Any]]:
    """Return the launches of a run, oldest first. Raises RunError if `run` is not a run folder."""
    if not (run / "run.json").exists() and (run / sweep.FILE).exists():
        raise RunError(Problem("RUN", run, f"is a sweep. Name one of its runs: muster ls {run}"))
    if not (run / "run.json").exists():
        raise RunError(Problem("RUN", run, "is not a run folder: it has no run.json. Name one that `muster ls` lists"))
    launches = (read_record(run / "run.json") or {}).get("launches")
    if not isinstance(launches, list) or not all(_is_launch(item) for item in launches):
        raise RunError(Problem("RUN", run, "has a run.json that is damaged, or that Muster did not write"))
    return launches


def _is_launch(item: Any) -> bool:
    """Whether this is a launch as `add_launch` writes it. Slurm's job ids become arguments of scancel, so they must be numbers."""
    if not isinstance(item, dict) or not isinstance(item.get("cluster"), str) or not isinstance(item.get("jobs"), dict):
        return False
    pattern = JOB_ID if item["cluster"] == "slurm" else ANY
    return all(isinstance(job_id, str) and pattern.fullmatch(job_id) for job_id in item["jobs"].values())


def add_launch(
    run: Path, command: Sequence[str], cluster: str, code: dict[str, Any], scripts: Sequence[str] = ()
) -> None:
    """Record a launch before its first job is started. `code` is what `snapshot.provenance` returned.

    `scripts`: the jobs whose scripts the user is to submit.
    """
    launches = read_launches(run) if (run / "run.json").exists() else []
    launch = {
        "command": list(command),
        "time": time.strftime(TIME),
        "cluster": cluster,
        "python": sys.version.split()[0],
        **code,
        "jobs": {},
        **({"scripts": list(scripts)} if scripts else {}),
    }
    write_json(run / "run.json", {"launches": [*launches, launch]})


def add_job(run: Path, name: str, job_id: str, slurm_name: str = "", folder: str = "") -> None:
    """Record a job that the newest launch has just started: its id, and on Slurm its name and the folder where it starts."""
    launches = read_launches(run)
    launches[-1]["jobs"][name] = job_id
    if slurm_name:
        launches[-1].setdefault("slurm", {})[name] = {"slurm_name": slurm_name, "folder": folder}
    write_json(run / "run.json", {"launches": launches})


def newest_jobs(run: Path) -> dict[str, StartedJob]:
    """Return the newest start of each job, by job name. Raises RunError if `run` is not a run folder."""
    return newest_jobs_of(run, read_launches(run))


def newest_jobs_of(run: Path, launches: Sequence[dict[str, Any]]) -> dict[str, StartedJob]:
    """The same from what `read_launches` has returned.

    A script that was submitted by hand is not in run.json, nor is a job of the best run of a sweep. Their ids come from the
    attempts that they opened, or from the names of their logs.
    """
    recorded = {  # later launches come last and win
        name: StartedJob(job_id, launch["cluster"], *_in_slurm(launch, name))
        for launch in launches
        for name, job_id in launch["jobs"].items()
    }
    if all(launch["cluster"] != "slurm" for launch in launches):
        return recorded
    since = _by_hand_since(launches)  # of jobs that a launch has submitted, only what was submitted by hand after it
    for name, (moment, job) in _unrecorded(run, launches).items():
        if name not in recorded or moment >= since:
            recorded[name] = job
    return recorded


def _unrecorded(run: Path, launches: Sequence[dict[str, Any]]) -> dict[str, tuple[float, StartedJob]]:
    """Return the newest start of each job as its attempts and, after a launch by hand, its logs tell it; with its time."""
    logs = run.glob(f"jobs/*/*{LOG}") if is_by_hand(launches) else ()
    found: dict[str, tuple[float, StartedJob]] = {}
    for path in [*logs, *run.glob("jobs/*/attempt-*/begin.json")]:
        is_log = path.name != "begin.json"
        name, moment = path.parent.name if is_log else path.parent.parent.name, path.stat().st_mtime
        begin = {"job_id": path.name.removesuffix(LOG)} if is_log else read_record(path) or {}
        if JOB_ID.fullmatch(job_id := str(begin.get("job_id"))) and (name not in found or moment >= found[name][0]):
            folder = (
                ".." if begin.get("folder") == ".." else "code"
            )  # a job of a sweep starts in the folder of the sweep
            found[name] = (moment, StartedJob(job_id, "slurm", folder=folder))
    return found


def is_by_hand(launches: Sequence[dict[str, Any]]) -> bool:
    """Whether the newest launch on Slurm has recorded no job: it wrote scripts for the user to submit, or was killed."""
    on_slurm = [launch for launch in launches if launch["cluster"] == "slurm"]
    return bool(on_slurm) and not on_slurm[-1]["jobs"]


def launched_at(launch: Mapping[str, Any]) -> float | None:
    """Return when a launch was recorded, in seconds since 1970; None for a damaged record."""
    try:
        return datetime.strptime(launch["time"], TIME).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def not_submitted(run: Path, launches: Sequence[dict[str, Any]]) -> list[str]:
    """Return the jobs whose scripts the newest launch wrote for the user, and that have not begun since."""
    if not is_by_hand(launches):
        return []
    since, begun = _by_hand_since(launches), _unrecorded(run, launches)
    scripts = launches[-1].get("scripts")
    names = [name for name in JOB_KINDS if isinstance(scripts, list) and name in scripts]
    return [name for name in names if name not in begun or begun[name][0] < since]


def _by_hand_since(launches: Sequence[dict[str, Any]]) -> float:
    """Return when the newest launch wrote scripts for the user; infinity if it submitted its jobs itself."""
    return (launched_at(launches[-1]) or 0.0) if is_by_hand(launches) else math.inf


def _in_slurm(launch: dict[str, Any], name: str) -> tuple[str, ...]:
    """Slurm's name of a job and the folder where it starts; nothing if the launch does not tell them both."""
    jobs = launch.get("slurm")
    job = jobs.get(name) if isinstance(jobs, dict) else None
    values = [job.get("slurm_name"), job.get("folder")] if isinstance(job, dict) else []
    texts = tuple(value for value in values if isinstance(value, str))
    return texts if len(texts) == len(values) else ()


def known_ids(run: Path) -> set[str]:
    """Return the id of every job that the run has ever started, also by hand."""
    begun = (read_record(path) or {} for path in run.glob("jobs/*/attempt-*/begin.json"))
    return {str(item.get("job_id")) for item in begun} | {
        str(job_id) for launch in read_launches(run) for job_id in launch["jobs"].values()
    }


def other_owner(path: Path) -> str | None:
    """Return the name of the user who owns a file or folder; None if it is this user, or if there is no such file."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    return None if owner == os.getuid() else user_name(owner)


def user_name(number: int) -> str:
    """Return the name of a user; the number itself if this machine does not know it, as in a container."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def closed_file(error: PermissionError) -> str:
    """Return one line about a file that this user may not read or write: whose it is, and what to do."""
    path = Path(str(error.filename))
    owner = next((name for place in (path, *path.parents) if (name := other_owner(place))), None)
    if owner in (None, "root"):  # `root` owns the folders above everyone's
        return f"{path}: {error.strerror}. Look at its owner and permissions with ls -l"
    return (
        f"{path}: belongs to {owner}, and is closed to you. {owner} can open a run to the group: "
        "chmod -R g+rX RUN to look at it, g+rwX to resume and merge it"
    )
