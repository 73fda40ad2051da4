"""Finds the logs of the ranks of a job, in all its attempts."""

from pathlib import Path

from conf.errors import Problem, RunError
from launcher.run_folder import attempts


def newest(run: Path, job: str, rank: int) -> Path:
    """Return the log of a rank's newest attempt. Raises RunError, which lists the ranks that have logs."""
    folder = run / "jobs" / job
    if paths := of_rank(folder, rank):
        return paths[-1]
    ranks = sorted({rank_of(path) for path in of_rank(folder, None)})
    if ranks:
        available = f"there are ranks {ranks[0]} to {ranks[-1]}"
    else:
        jobs = sorted(path.name for path in run.glob("jobs/*/") if of_rank(path, None))
        others = f", or the logs of other jobs: --job {' or --job '.join(jobs)}" if jobs else ""
        available = f"the job has not written any yet. Its state: muster status {run}{others}"
    raise RunError(Problem("RANK", rank, f"no log of {job}: {available}"))


def newest_of_all(run: Path, job: str) -> list[Path]:
    """Return the logs of all ranks of the newest attempt, by rank. Raises RunError if there are none."""
    paths = of_rank(run / "jobs" / job, None)
    if not paths:
        return [newest(run, job, 0)]  # raises
    return sorted((path for path in paths if _start(path) == _start(paths[-1])), key=rank_of)


def of_rank(folder: Path, rank: int | None) -> list[Path]:
    """Return the logs of a rank (None: of all ranks) in all attempts of the job in `folder`, in the order of their last lines.

    On Slurm a rank logs to attempt-N/rank-R.log, and ID_0_log.out is only the batch script's log. The local executor
    writes ID_R_log.out for every rank R.
    """
    pattern = "*" if rank is None else str(rank)
    rank_logs = [*folder.glob(f"attempt-*/rank-{pattern}.log")]
    slurm_ids = {
        str(attempts.begin_record(folder, attempt.name.removeprefix("attempt-")).get("job_id"))
        for attempt in {path.parent for path in rank_logs}
    }
    submitit_logs = folder.glob(f"*_{pattern}_log.out")
    found = [*rank_logs, *(path for path in submitit_logs if _id(path) not in slurm_ids)]
    return sorted((path for path in found if _rank(path) is not None), key=lambda path: path.stat().st_mtime)


def rank_of(log: Path) -> int:
    """Return the rank that writes this log."""
    return _rank(log) or 0


def _rank(log: Path) -> int | None:
    text = log.stem.removeprefix("rank-") if log.suffix == ".log" else log.stem.rsplit("_", 2)[1]
    return int(text) if text.isdecimal() else None


def _start(log: Path) -> str:
    """What the logs of the ranks of one attempt have in common: its folder, or the id in their names."""
    return log.parent.name if log.suffix == ".log" else _id(log)


def _id(log: Path) -> str:
    """The id in the name of a log of submitit: that of a task of an array has a `_` too, as in 123_4_0_log.out."""
    return log.name.rsplit("_", 2)[0]
