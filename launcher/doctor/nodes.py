"""Submits the checks of `muster doctor` to a node of each kind that the jobs ask for, waits for them, and reads what they found."""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from conf.files import write_text
from conf.schema import Config
from conf.schema_cluster import Resources
from launcher import slurm
from launcher.doctor.check import Check, Level, error
from launcher.plan import Job
from launcher.run_folder import record
from launcher.status import pending, state
from launcher.status.tables import duration
from launcher.submit import render, sbatch, sweep_scripts
from launcher.supervise import start_failures
from launcher.supervise.exit_diagnosis import file_tail

JOB_OF = {"train": "preflight", "cpu": "preprocess", "inference": "evaluate"}
"""By section of `cluster`: a job that has its resources, and so its environment and its container."""
TIME_MIN = 15
POLL_S = 2.0
SAY_EVERY_S = 30.0
SECONDS = re.compile(r" \(\d+\.\d s\)$")
"""How long an operation took, which differs from place to place."""
SETTLE_S = 20.0
"""How long a file that a node has written may need to be seen on this machine."""


@dataclass
class Place:
    """Where checks run: this machine, or a node of a kind that some sections of the config ask for."""

    name: str
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True)
class Node:
    """A job that looks at one node."""

    sections: tuple[str, ...]
    job_id: str
    name: str
    """Of the job in Slurm."""
    run: Path

    @property
    def title(self) -> str:
        return ", ".join(self.sections)

    @property
    def result(self) -> Path:
        return self.run / f"doctor-{self.sections[0]}.json"

    @property
    def log(self) -> Path:
        return self.run / "jobs" / f"doctor-{self.sections[0]}.log"


def kinds(config: Config) -> list[tuple[str, ...]]:
    """Return the sections of `cluster` in groups that get nodes of the same kind."""
    groups: dict[str, list[str]] = {}
    for name in JOB_OF:
        part: Resources = getattr(config.cluster, name)
        kind = (part.partition, part.qos, part.constraint, bool(part.gpus_per_node), part.gpu_type, part.sbatch)
        groups.setdefault(repr(kind), []).append(name)
    return [tuple(names) for names in groups.values()]


def script(config: Config, sections: tuple[str, ...], run: Path) -> tuple[str, str]:
    """Return (name of the job, script) that looks at a node of these sections: one process with all that a node's ranks get."""
    section = sections[0]
    part: Resources = getattr(config.cluster, section)
    cpus = part.ranks_per_node * part.cpus_per_rank
    job = Job(JOB_OF[section], replace(part, nodes=1, ranks_per_node=1, cpus_per_rank=cpus, time_min=TIME_MIN))
    words = [str(run / "config.yaml"), section, str(run / f"doctor-{section}.json")]
    command = f"{render.python_command(config, job)} -u -m launcher.doctor.node {render.quoted(words)}"
    name, log = f"doctor/{section}", run / "jobs" / f"doctor-{section}.log"
    own = [("job-name", name), ("chdir", str(run / "code")), ("output", str(log))]
    lines = [
        line
        for line in sweep_scripts.directives(config, job)
        if not line.startswith(("#SBATCH --signal", "#SBATCH --requeue"))
    ]
    lines += [f"#SBATCH --{option}={render.quoted([value])}" for option, value in own]
    text = render.template("doctor.sbatch.j2").render(
        places=", ".join(sections),
        directives=lines,
        command=command,
        srun_args=config.cluster.srun_args,
        **render.values(config, job),
    )
    return name, text + "\n"


def submit(config: Config, run: Path, nodes: list[Node]) -> None:
    """Submit a job for each kind of node, and add each to `nodes` as soon as it is queued. Raises SlurmError."""
    for sections in kinds(config):
        name, text = script(config, sections, run)
        path = run / "jobs" / f"doctor-{sections[0]}.sbatch"
        write_text(path, text)
        known = frozenset((*(node.job_id for node in nodes), *record.known_ids(run)))
        nodes.append(Node(sections, sbatch.submit(path, partial(_is_ours, name, run / "code", known)), name, run))


def _is_ours(name: str, folder: Path, known: frozenset[str], seen: slurm.SlurmJob) -> bool:
    return seen.name == name and seen.folder == str(folder) and seen.job_id not in known


def cancel(nodes: list[Node]) -> None:
    """End the jobs that still wait or run."""
    if nodes:
        slurm.cancel([node.job_id for node in nodes])


def wait(nodes: list[Node], run: Path) -> None:
    """Wait until no job is pending or running, and say again and again on stderr what they do and for how long."""
    began, said, said_at = time.monotonic(), "", 0.0
    while live := _live(nodes, run):
        took_s, text = time.monotonic() - began, ", ".join(live)
        if text != said or took_s - said_at >= SAY_EVERY_S:
            print(f"{duration(took_s)}  {text}", file=sys.stderr, flush=True)
            said, said_at = text, took_s
        time.sleep(POLL_S)


def _live(nodes: list[Node], run: Path) -> list[str]:
    """Return what each job does that has not ended."""
    found = slurm.jobs([node.job_id for node in nodes])
    lines = []
    for node in nodes:
        seen = found.get(node.job_id)
        if seen and (seen.silence or seen.state in slurm.LIVE_STATES):
            job = state.JobState(JOB_OF[node.sections[0]], node.job_id, seen.state, None, note=seen.silence)
            lines.append(_described(f"node of {node.title}", job))
    return lines + [_described("preflight", job) for job in state.job_states(run) if job.state in slurm.LIVE_STATES]


def _described(title: str, job: state.JobState) -> str:
    why = job.note or "".join(pending.reasons([job]).values())
    return f"{title} {job.job_id} {job.state.lower()}{f' ({why})' if why else ''}"


def results(nodes: list[Node], run: Path) -> list[Place]:
    """Return what was found on each node; for a job without a result, the end of its log."""
    places = [_place(node) for node in nodes]
    for node, place in zip(nodes, places, strict=True):
        if "train" in node.sections:
            place.checks.append(preflight(run))
    return places


def _place(node: Node) -> Place:
    seen = slurm.jobs([node.job_id]).get(node.job_id, slurm.SlurmJob(node.job_id, "UNKNOWN"))
    deadline = time.monotonic() + (SETTLE_S if seen.state == "COMPLETED" else 0)
    while not node.result.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    try:
        found = json.loads(node.result.read_text(encoding="utf-8"))
        checks = [Check(**item | {"level": Level(item["level"])}) for item in found["checks"]]
        return Place(f"{node.title} on {found['host']}", checks)
    except (OSError, ValueError, KeyError, TypeError):
        log = file_tail(node.log)
        lines = log.strip().splitlines()
        said = start_failures.last_error(log) or (lines[-1].strip() if lines else "its log is empty")
        known = start_failures.find(log) or {"reason": said, "remedy": ""}
        text = f"job {node.job_id} {seen.state.lower()} without an answer: {known['reason']}"
        remedy = known["remedy"] or "cluster.python, container, modules and setup decide what the job finds there"
        return Place(node.title, [error("node", "checks", text, f"{remedy}. See {node.log}")])


def preflight(run: Path) -> Check:
    """Return what the preflight job has measured: matrix products and all-reduce of all ranks of one node."""
    job = next((job for job in state.job_states(run) if job.name == "preflight"), None)
    verdict = (job and job.verdict) or {}
    if job is None or verdict.get("status") != "completed":
        why = verdict.get("reason") or (job.state.lower() if job else "not submitted")
        return error("preflight", "ranks", str(why).splitlines()[0], str(verdict.get("remedy") or f"muster why {run}"))
    reports = json.loads((run / "preflight.json").read_text(encoding="utf-8"))
    slowest = min(report["matmul_tflops"] for report in reports)
    bus = min(report["bus_gb_s"] for report in reports)
    device = reports[0]["device"]
    return Check(
        "preflight",
        "ranks",
        f"{len(reports)} on {device}: matrix products {slowest:.2f} TFLOP/s, all-reduce {bus:.2f} GB/s, right",
    )


def side_by_side(places: list[Place], marks: Mapping[Level, tuple[str, str]]) -> Iterator[tuple[str, Level]]:
    """Yield the lines of a table, each with its worst level: a column of marks for each place, then what was found."""
    width = max(*(len(place.name) for place in places), 7) + 2
    yield "".join(f"{place.name:<{width}}" for place in places) + "check", Level.green
    by_key: dict[tuple[str, str], dict[int, Check]] = {}
    for number, place in enumerate(places):
        for check in place.checks:
            by_key.setdefault((check.topic, check.name), {})[number] = check
    for (topic, name), found in by_key.items():
        worst = max((check.level for check in found.values()), key=list(Level).index)
        words = [marks[found[number].level][1].strip() if number in found else "-" for number in range(len(places))]
        row = "".join(f"{word:<{width}}" for word in words)
        texts = dict.fromkeys(SECONDS.sub("", check.found) for check in found.values())
        if len(texts) == 1:
            yield f"{row}{topic}: {name}  {next(iter(texts))}", worst
        else:
            yield f"{row}{topic}: {name}", worst
            for text in texts:
                of_text = [number for number, check in found.items() if SECONDS.sub("", check.found) == text]
                names = ", ".join(places[number].name for number in of_text)
                yield f"{'':{width * len(places)}}  {names}: {text}", found[of_text[0]].level
        for remedy in dict.fromkeys(check.remedy for check in found.values() if check.remedy):
            yield f"{'':{width * len(places)}}  -> {remedy}", Level.green
