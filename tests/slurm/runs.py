"""Starts Muster runs on the test cluster, waits for them, and reads their files. Shared by the tests on a real Slurm."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from conf.files import write_json
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
"""Overrides for two nodes with two ranks each, on CPUs, as the test cluster has them."""


def damaged_model(folder: Path) -> Path:
    """A model folder that a launch accepts, and that has none of the weights."""
    shutil.copytree(CLONE / "examples/tokenizer", folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": 1024, "num_key_value_heads": 2, **sizes})
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def launch(*overrides: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run launch.py for the test cluster."""
    return subprocess.run(
        [sys.executable, CLONE / "launch.py", *TWO_BY_TWO, *overrides],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start(run: Path, *overrides: str) -> None:
    """Submit a run. If it is refused, the test fails with the message."""
    done = launch(f"run_dir={run}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr


def finish(run: Path, timeout_s: float = 600) -> dict[str, state.JobState]:
    """Wait until no job of the run is pending or running. Returns the state of each job by name."""
    deadline = time.monotonic() + timeout_s
    while state.active_jobs(run) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not state.active_jobs(run), "\n".join(
        [str(state.active_jobs(run)), *(log.read_text()[-2000:] for log in run.glob("jobs/*/*/rank-0.log"))]
    )
    return job_states(run)


def job_states(run: Path) -> dict[str, state.JobState]:
    """The state of each job now, by name."""
    return {job.name: job for job in state.job_states(run)}


def is_active(run: Path) -> bool:
    """Whether a job of the run is pending or running."""
    return bool(state.active_jobs(run))


def final_verdict(run: Path, job: str, timeout_s: float = 240) -> dict[str, Any]:
    """Wait for the end of the run, and return the verdict of a job's last attempt."""
    verdict = finish(run, timeout_s)[job].verdict
    assert verdict, f"{job} has no verdict"
    return verdict


def complete(run: Path, *overrides: str) -> None:
    """Submit a run and wait. Every job must complete."""
    start(run, *overrides)
    for name, job in finish(run).items():
        assert job.verdict and job.verdict["status"] == "completed", (name, job, (run / "jobs" / name).glob("*"))


def logs(run: Path, job: str) -> dict[int, str]:
    """The log of each rank of a job's newest attempt, by rank."""
    number = attempts.newest_attempt(run / "jobs" / job)
    paths = (run / "jobs" / job / f"attempt-{number}").glob("rank-*.log")
    return {int(path.stem.removeprefix("rank-")): path.read_text() for path in sorted(paths)}


def environments(run: Path, job: str) -> list[dict[str, str]]:
    """The environment variables that each rank has logged, in the order of ranks."""
    matches = [re.search(r" INFO environment (\{.*)$", text, re.MULTILINE) for text in logs(run, job).values()]
    return [json.loads(match[1]) for match in matches if match]


def queue() -> list[str]:
    """Ids of all pending and running jobs of the cluster."""
    return slurm.call("squeue", "--noheader", "--format", "%i").split()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict[str, Any]]:
    """The values of metrics.jsonl that must not depend on how often a run was interrupted."""
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [{name: line.get(name) for name in names} for line in metrics(run)]


def wait_until(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Wait for a condition. After the timeout, the test fails with the condition's name."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        name = getattr(condition, "__name__", condition)
        assert time.monotonic() < deadline, f"{name}: not true after {timeout_s:g} s"
        time.sleep(0.1)


def step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    return max((line["step"] for line in attempts.metrics(run)), default=0)


def job_id(run: Path, job: str) -> str:
    """Slurm's id of a job of the newest launch."""
    return str(json.loads((run / "run.json").read_text())["launches"][-1]["jobs"][job])


def processes(pattern: str) -> list[int]:
    """Ids of the processes that `pgrep -f` finds for a regular expression."""
    done = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def ranks(run: Path) -> dict[int, int]:
    """The process id of each rank of a run's training."""
    pids = {}
    for pid in processes(f"submitit.core._submit {run}/jobs/train$"):
        with suppress(OSError):
            if "python" in Path(f"/proc/{pid}/exe").resolve().name:  # srun's command line has the same end
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                [rank] = [int(item[13:]) for item in variables if item.startswith(b"SLURM_PROCID=")]
                pids[rank] = pid
    return pids


def kill_a_rank(run: Path) -> None:
    """SIGKILL the last rank of training."""
    _, pid = max(ranks(run).items())
    os.kill(pid, signal.SIGKILL)


def stop_rank(run: Path, rank: int) -> None:
    """SIGSTOP a rank of training's first attempt, as a debugger or a node's power management does."""
    wait_until(lambda: rank in attempts.published_ranks(run / "jobs/train/attempt-1"))
    os.kill(attempts.published_ranks(run / "jobs/train/attempt-1")[rank]["pid"], signal.SIGSTOP)


def fingerprints(run: Path) -> dict[str, str]:
    """SHA-256 of each weight of the last checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    sums: dict[str, str] = json.loads((newest / "fingerprint.json").read_text())
    return sums


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m launcher ARGUMENTS`."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, arguments)], capture_output=True, text=True, cwd=CLONE, check=False
    )


class Start(Protocol):
    """Starts a training with more overrides, on the preprocessed data of `whole`. Returns its run folder."""

    def __call__(self, *overrides: str) -> Path: ...


def starter(run: Path, data: Path, overrides: list[str]) -> Iterator[Start]:
    """The function for a fixture `start`. The run is cancelled when the test ends."""

    def begin(*more: str) -> Path:
        start(run, *overrides, "jobs=[train]", *more)
        # launch.py needs a new folder, so the data is copied afterwards, while the ranks still import torch
        shutil.copytree(data, run / "data")
        return run

    yield begin
    command("cancel", run)
