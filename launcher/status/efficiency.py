"""Computes what the jobs of a run had and used: CPUs, memory, GPUs, time in the queue, and time lost to restarts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from conf import resolve
from conf.errors import Problem, RunError
from conf.jobs import JOB_KINDS, RESUMABLE
from conf.schema import Config
from launcher import plan
from launcher.run_folder import attempts, record
from launcher.run_folder.status import COMPLETED
from launcher.status import accounting


@dataclass(frozen=True)
class Efficiency:
    """One job of a run, over all its attempts. None: not recorded."""

    job: str
    attempts: int
    gpus: int
    """Asked for, on all nodes."""
    cpus: int
    """Asked for, on all nodes."""
    ran_s: float
    """Of all attempts."""
    waited_s: float | None
    """In Slurm's queue, before all attempts, without the time in which the jobs that it reads from were not done."""
    lost_s: float
    """To restarts: work that was not saved and was done again, and attempts of jobs that save nothing."""
    gpu_hours: float
    in_steps: float | None = None
    """Share of the time that was spent in training steps; the rest is start, evaluations, checkpoints and lost work."""
    mfu: float | None = None
    """Median share of the GPUs' peak FLOP/s in training steps."""
    gpu_share: float | None = None
    """Mean utilization of the GPUs, where Slurm records it."""
    gpu_memory_gib: float | None = None
    """Peak of the GPU with the most."""
    gpu_memory_asked_gib: float | None = None
    """`gpu_memory_gib` of the config."""
    cpu_share: float | None = None
    """CPU time over CPUs x time; without accounting, that of rank 0."""
    memory_gib: float | None = None
    """Peak of host memory of all ranks."""
    memory_asked_gib: float | None = None
    """On all nodes."""


@dataclass(frozen=True)
class _Attempt:
    began: float
    ended: float
    job_id: str
    status: str | None
    """None while it runs."""
    step: int
    resumed: int
    cpu_s: float | None


def read(run: Path) -> list[Efficiency]:
    """Return the efficiency of each job that has begun, in the order of the pipeline. Raises RunError if RUN is not a run."""
    launches = record.read_launches(run)
    if not (run / "config.yaml").exists():
        raise RunError(Problem("RUN", run, "has no config.yaml, so what its jobs asked for is unknown"))
    config = resolve.load(run / "config.yaml")
    tried = {name: found for name in JOB_KINDS if (found := _attempts(run / "jobs" / name))}
    # the jobs of the best run of a sweep are not in run.json
    newest = {job.job_id for job in record.newest_jobs_of(run, launches).values() if job.cluster == "slurm"}
    ids = _slurm_ids(launches) | newest
    used = accounting.read(sorted({each.job_id for name in tried for each in tried[name]} & ids))
    ends = {name: [each.ended for each in found if each.status == COMPLETED] for name, found in tried.items()}
    return [_efficiency(run, config, name, tried[name], launches, ends, used) for name in tried]


def _efficiency(
    run: Path,
    config: Config,
    name: str,
    tried: list[_Attempt],
    launches: Sequence[dict[str, Any]],
    ends: dict[str, list[float]],
    used: dict[str, accounting.Used],
) -> Efficiency:
    part = plan.resources(config, name)
    ranks, gpus = part.ranks, part.nodes * (part.gpus_per_node or 0)
    steps = [line for line in attempts.metrics(run) if "loss" in line] if name in RESUMABLE else []
    step_s, shares, memory = (_numbers(steps, key) for key in ("seconds", "mfu", "memory_gib_max"))
    ran_s = sum(each.ended - each.began for each in tried)
    accounted = used.get(tried[-1].job_id, accounting.Used())
    cpus = ranks * part.cpus_per_rank
    own = [(each.cpu_s, each.ended - each.began) for each in tried if each.cpu_s is not None]
    own_s = sum(elapsed for _, elapsed in own) * part.cpus_per_rank
    own_start = record.is_by_hand(run) or not _slurm_ids(
        launches
    )  # it is not known when it was submitted, or it was not
    asked_gib = part.memory_gib * part.nodes if part.memory_gib else None
    return Efficiency(
        job=name,
        attempts=len(tried),
        gpus=gpus,
        cpus=accounted.cpus or cpus,
        ran_s=ran_s,
        waited_s=None if own_start else _waited_s(name, tried, launches, ends),
        lost_s=_lost_s(name, tried, median(step_s) if step_s else 0.0),
        gpu_hours=gpus * ran_s / 3600,
        in_steps=min(1.0, sum(step_s) / ran_s) if step_s and ran_s else None,
        mfu=median(shares) if shares else None,
        gpu_share=accounted.gpu_share,
        gpu_memory_gib=max(memory) if memory and gpus else None,
        gpu_memory_asked_gib=part.gpu_memory_gib if gpus else None,
        cpu_share=accounted.cpu_share or (sum(cpu_s for cpu_s, _ in own) / own_s if own_s else None),
        memory_gib=accounted.memory_gib,
        memory_asked_gib=accounted.memory_asked_gib or asked_gib,
    )


def _attempts(folder: Path) -> list[_Attempt]:
    newest, verdicts = attempts.history(folder)
    by_number = {verdict["attempt"]: verdict for verdict in verdicts}
    found = []
    for number in range(1, (newest or 0) + 1):
        begin = attempts.begin_record(folder, number)
        verdict = by_number.get(number, {})
        began, ended = attempts.number(begin.get("started")), attempts.number(verdict.get("ended"))
        if ended is None and number == newest and not verdict:
            ended = time.time()
        if began is None or ended is None:  # it was lost without a verdict, or the record is damaged
            continue
        rank = attempts.read_record(folder / f"attempt-{number}/rank-0.json") or {}
        found.append(
            _Attempt(
                began,
                max(began, ended),
                str(begin.get("job_id")),
                verdict.get("status"),
                int(attempts.number(verdict.get("step")) or 0),
                int(attempts.number(begin.get("resumed")) or 0),
                attempts.number(rank.get("cpu_s")),
            )
        )
    return found


def _numbers(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [value for line in lines if (value := attempts.number(line.get(name))) is not None]


def _lost_s(name: str, tried: list[_Attempt], step_s: float) -> float:
    """Return the seconds of work that was done again: steps after the checkpoint from which the next attempt went on."""
    if name not in RESUMABLE:
        return sum(each.ended - each.began for each in tried[:-1])
    pairs = zip(tried, tried[1:], strict=False)
    return sum(min(max(0, each.step - after.resumed) * step_s, each.ended - each.began) for each, after in pairs)


def _waited_s(
    name: str, tried: list[_Attempt], launches: Sequence[dict[str, Any]], ends: dict[str, list[float]]
) -> float:
    """Return the seconds between the moment from which each attempt could have begun and that at which it did."""
    starts = [seconds for launch in launches if (seconds := _time(launch)) is not None]
    inputs = [end for parent in JOB_KINDS[name].after for end in ends.get(parent, [])]
    total = 0.0
    for number, each in enumerate(tried):
        before = [moment for moment in (*starts, *inputs) if moment <= each.began + 1]
        before += [tried[number - 1].ended] if number else []
        total += max(0.0, each.began - max(before, default=each.began))
    return total


def _slurm_ids(launches: Sequence[dict[str, Any]]) -> set[str]:
    """Return the ids of the jobs that were submitted to Slurm; begin.json of a local attempt has a process id."""
    return {job_id for launch in launches if launch["cluster"] == "slurm" for job_id in launch["jobs"].values()}


def _time(launch: dict[str, Any]) -> float | None:
    try:
        return datetime.strptime(launch["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, TypeError, ValueError):
        return None
