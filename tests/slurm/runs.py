"""Starts Muster runs on the test cluster, and waits for them: what the tests on a real Slurm share."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import slurm
from launcher.run_folder import attempts
from launcher.status import state

CLONE = Path(__file__).resolve().parents[2]
TWO_BY_TWO = [
    "cluster=slurm", "cluster.train.nodes=2", "cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0",
    "cluster.train.cpus_per_rank=1", "cluster.train.memory_gib=null", "cluster.train.time_min=20", "cluster.train.exclusive=false",
    "cluster.cpu.cpus_per_rank=1", "cluster.cpu.memory_gib=null", "cluster.cpu.time_min=20", "cluster.inference.gpus_per_node=0",
    "cluster.inference.cpus_per_rank=1", "cluster.inference.memory_gib=null", "cluster.inference.time_min=20",
]  # fmt: skip
"""Two nodes of two ranks, on CPUs: what the cluster of the tests has."""


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """launch.py on the test cluster."""
    return subprocess.run(
        [sys.executable, CLONE / "launch.py", *TWO_BY_TWO, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def start(run: Path, *words: str) -> None:
    """Submit; a refusal fails the test with what was said."""
    done = launch(f"run_dir={run}", *words)
    assert done.returncode == 0, done.stdout + done.stderr


def finish(run: Path, timeout_s: float = 240) -> dict[str, state.JobState]:
    """Wait until no job of the run waits or runs; the states by job."""
    deadline = time.monotonic() + timeout_s
    while state.active_jobs(run) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not state.active_jobs(run), "\n".join(
        [str(state.active_jobs(run)), *(log.read_text()[-2000:] for log in run.glob("jobs/*/*/rank-0.log"))]
    )
    return {job.name: job for job in state.job_states(run)}


def complete(run: Path, *words: str) -> None:
    """Submit, wait, and insist that every job completed."""
    start(run, *words)
    for name, job in finish(run).items():
        assert job.verdict and job.verdict["status"] == "completed", (name, job, (run / "jobs" / name).glob("*"))


def logs(run: Path, job: str) -> dict[int, str]:
    """What each rank of a job's newest attempt has printed."""
    number = attempts.newest_attempt(run / "jobs" / job)
    found = (run / "jobs" / job / f"attempt-{number}").glob("rank-*.log")
    return {int(path.stem.removeprefix("rank-")): path.read_text() for path in sorted(found)}


def environments(run: Path, job: str) -> list[dict[str, str]]:
    """The environment of each rank, as its own log shows it."""
    return [
        json.loads(re.search(r" INFO environment (\{.*)$", text, re.MULTILINE)[1]) for text in logs(run, job).values()
    ]


def queue() -> list[str]:
    """Ids of all jobs that wait or run."""
    return slurm.call("squeue", "--noheader", "--format", "%i").split()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict[str, Any]]:
    """What must be the same, line by line, however often a run was interrupted."""
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [{name: line.get(name) for name in names} for line in metrics(run)]


def until(true: Callable[[], object], timeout_s: float = 120) -> None:
    """Wait for something; the test fails with its name when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{true.__name__} not after {timeout_s:g} s"
        time.sleep(0.1)


def step(run: Path) -> int:
    """The last step that training has written down; 0 before the first."""
    return max((line["step"] for line in attempts.metrics(run)), default=0)


def job_id(run: Path, job: str) -> str:
    return str(json.loads((run / "run.json").read_text())["launches"][-1]["jobs"][job])


def processes(pattern: str) -> list[int]:
    """Process ids of what has a command line that fits."""
    done = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def ranks(run: Path) -> dict[int, int]:
    """Process ids of the ranks of a run's training, by rank."""
    found = {}
    for pid in processes(f"submitit.core._submit {run}/jobs/train$"):
        with suppress(OSError):
            if "python" in Path(f"/proc/{pid}/exe").resolve().name:  # srun's own command line ends likewise
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                [rank] = [int(word[13:]) for word in words if word.startswith(b"SLURM_PROCID=")]
                found[rank] = pid
    return found


def kill_a_rank(run: Path) -> None:
    """SIGKILL the last rank of training."""
    _, pid = max(ranks(run).items())
    os.kill(pid, signal.SIGKILL)


def stop_rank(run: Path, rank: int) -> None:
    """SIGSTOP a rank of training's first attempt, as a debugger or a node's power guard does."""
    until(lambda: rank in attempts.published_ranks(run / "jobs/train/attempt-1"))
    os.kill(attempts.published_ranks(run / "jobs/train/attempt-1")[rank]["pid"], signal.SIGSTOP)


def fingerprints(run: Path) -> dict[str, str]:
    """SHA-256 of each weight of the last checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    found: dict[str, str] = json.loads((newest / "fingerprint.json").read_text())
    return found


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """`python -m launcher words...`"""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, words)], capture_output=True, text=True, cwd=CLONE, check=False
    )
