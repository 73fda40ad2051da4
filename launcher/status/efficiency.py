"""Computes what the jobs of a run had and used: CPUs, memory, GPUs, time in the queue, and time lost to restarts."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from conf import resolve
from conf.errors import Problem, RunError
from conf.jobs import JOB_KINDS, RESUMABLE
from conf.schema import Config
from launcher import plan, slurm
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
    gpus: int | None
    """None: not recorded."""
    cpu_s: float | None


def read(run: Path) -> list[Efficiency]:
    """Return the efficiency of each job that has begun, in the order of the pipeline. Raises RunError if RUN is not a run."""
    return report([run])[0][run]


def report(runs: Sequence[Path]) -> tuple[dict[Path, list[Efficiency]], list[str]]:
    """Return the same of several runs, and what is missing, and why. Accounting is asked once. Raises RunError."""
    facts = {run: _facts(run) for run in runs}
    ids = {job_id for found in facts.values() for job_id in found.slurm_ids}
    folders = {str(place) for run in runs for place in (run / "code", run.parent)}
    notes: list[str] = []
    known: dict[str, list[accounting.Record]] = {}
    try:
        for item in accounting.records(sorted(ids), folders) if ids else []:
            known.setdefault(item.job_id, []).append(item)
    except slurm.SlurmError as error:
        notes.append(
            f"Slurm's accounting does not answer ({error}): use of memory and GPUs is unknown, and CPU used is that of rank 0"
        )
    jobs = {run: [_efficiency(run, found, name, known) for name in found.tried] for run, found in facts.items()}
    if ids and not notes:
        notes += _missing([job for listed in jobs.values() for job in listed], ids - known.keys())
    return jobs, notes


def _missing(jobs: Sequence[Efficiency], unknown: set[str]) -> Iterator[str]:
    """Yield what accounting answers, but does not know."""
    if unknown:
        yield f"Slurm's accounting does not know {', '.join(sorted(unknown))}: forgotten, or of another cluster"
    elif any(job.memory_gib is None for job in jobs):
        yield (
            "Slurm has not measured the memory of every job: it looks every 30 s (JobAcctGatherFrequency), "
            "and never with JobAcctGatherType=none"
        )
    if any(job.gpus and job.gpu_share is None for job in jobs):
        yield "Slurm has not measured the use of GPUs: sites turn it on with AccountingStorageTRES=gres/gpuutil"


@dataclass(frozen=True)
class _Facts:
    """What a run folder tells."""

    config: Config
    launches: list[dict[str, Any]]
    tried: dict[str, list[_Attempt]]
    """The attempts of each job."""
    slurm_ids: set[str]
    """The ids of its Slurm jobs that have begun."""
    ends: dict[str, list[float]]
    """When attempts of each job completed."""


def _facts(run: Path) -> _Facts:
    launches = record.read_launches(run)
    if not (run / "config.yaml").exists():
        raise RunError(Problem("RUN", run, "has no config.yaml, so what its jobs asked for is unknown"))
    tried = {name: found for name in JOB_KINDS if (found := _attempts(run / "jobs" / name))}
    # jobs that were submitted by hand, and those of the best run of a sweep, are not in run.json
    newest = {job.job_id for job in record.newest_jobs_of(run, launches).values() if job.cluster == "slurm"}
    ids = _slurm_ids(launches) | newest
    return _Facts(
        resolve.load(run / "config.yaml"),
        launches,
        tried,
        {each.job_id for found in tried.values() for each in found} & ids,
        {name: [each.ended for each in found if each.status == COMPLETED] for name, found in tried.items()},
    )


def _efficiency(run: Path, facts: _Facts, name: str, known: Mapping[str, list[accounting.Record]]) -> Efficiency:
    config, launches, tried = facts.config, facts.launches, facts.tried[name]
    part = plan.resources(config, name)
    ranks, gpus = part.ranks, part.nodes * (part.gpus_per_node or 0)
    steps = [line for line in attempts.metrics(run) if "loss" in line] if name in RESUMABLE else []
    step_s, shares, memory = (_numbers(steps, key) for key in ("seconds", "mfu", "memory_gib_max"))
    ran_s = sum(each.ended - each.began for each in tried)
    accounted = accounting.used([item for job_id in {each.job_id for each in tried} for item in known.get(job_id, [])])
    cpus = ranks * part.cpus_per_rank
    own = [(each.cpu_s, each.ended - each.began) for each in tried if each.cpu_s is not None]
    own_s = sum(elapsed for _, elapsed in own) * part.cpus_per_rank
    own_start = record.is_by_hand(launches) or not _slurm_ids(
        launches
    )  # it is not known when it was submitted, or it was not
    asked_gib = part.memory_gib * part.nodes if part.memory_gib else None
    return Efficiency(
        job=name,
        attempts=len(tried),
        gpus=gpus,
        cpus=accounted.cpus or cpus,
        ran_s=ran_s,
        waited_s=None if own_start else _waited_s(name, tried, launches, facts.ends),
        lost_s=_lost_s(name, tried, median(step_s) if step_s else 0.0),
        gpu_hours=sum((gpus if each.gpus is None else each.gpus) * (each.ended - each.began) for each in tried) / 3600,
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
        elif ended is None:  # it was lost without a verdict
            ended = attempts.last_sign(folder / f"attempt-{number}")
        if began is None or ended is None:  # the record is damaged
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
                None if (gpus := attempts.number(begin.get("gpus"))) is None else int(gpus),
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
    starts = [seconds for launch in launches if (seconds := record.launched_at(launch)) is not None]
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
