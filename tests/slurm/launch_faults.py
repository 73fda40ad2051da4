"""Faults of Slurm's controller and of a launch. Those of a launch start a run with `words`, and return what launch.py printed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher import slurm
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.faults import Scene

SILENCE_S = 90.0
"""How long the controller answers nothing: longer than the 50 s or so after which Slurm's commands give up."""
LAUNCH_S = 400.0
LOSES_THE_FIRST_ANSWER = """#!/bin/sh
[ -e "$0.done" ] && exec {sbatch} "$@"
{sbatch} "$@" > "$0.done" || exit 1
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1
"""
Launched = subprocess.CompletedProcess[str]


@contextmanager
def silence(cluster: Cluster) -> Iterator[None]:
    """Let the controller answer nothing during the block, as one that is overloaded: it is stopped, and its port stays open."""
    pid = cluster.daemons["slurmctld"].pid()
    assert pid is not None, "no controller"
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def at_requeue(scene: Scene) -> str:
    """Ask training to stop, and silence the controller before it can ask to be requeued."""
    slurm.call("scancel", "--signal=USR2", scene.job_id)
    with silence(scene.cluster):
        time.sleep(SILENCE_S)
    return ""


def at_status(scene: Scene) -> str:
    """Silence the controller, and look at the run meanwhile: nobody may be told that it has failed or does not exist."""
    with silence(scene.cluster):
        ends = time.monotonic() + SILENCE_S
        shown = runs.command("status", scene.run)
        time.sleep(max(0.0, ends - time.monotonic()))
    # It waits for an answer for some time. Afterwards it either has one, or says that there is none.
    lines = [line for line in shown.stdout.splitlines() if line.startswith("train ")]
    has_answer = shown.returncode == 0 and any("running" in line for line in lines)
    has_none = shown.returncode == 2 and "does not answer" in shown.stderr
    assert has_answer or has_none, (shown.returncode, shown.stdout, shown.stderr)
    return "with an answer" if has_answer else "without an answer"


def launch_in_silence(cluster: Cluster, words: Sequence[str]) -> Launched:
    """Launch while the controller answers nothing for a while. It may have received the job before it stalled."""
    with silence(cluster):
        speaks = threading.Timer(SILENCE_S, os.kill, (cluster.daemons["slurmctld"].pid(), signal.SIGCONT))
        speaks.start()
        return _run([sys.executable, str(runs.CLONE / "launch.py"), *words])


def launch_with_a_lost_answer(cluster: Cluster, words: Sequence[str]) -> Launched:
    """Launch with an sbatch that queues the job, and then gives up waiting for the controller's answer."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "sbatch"
        program.write_text(LOSES_THE_FIRST_ANSWER.format(sbatch=shutil.which("sbatch")))
        program.chmod(0o755)
        path = {"PATH": f"{folder}:{os.environ['PATH']}"}
        return _run([sys.executable, str(runs.CLONE / "launch.py"), *words], path)


def launch_inside_a_job(cluster: Cluster, words: Sequence[str]) -> Launched:
    """Launch in a step of another job, whose variables ask for other memory and CPUs, and bind to one core."""
    step = ["srun", "--quiet", "--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--mem-per-cpu=500", "--cpu-bind=cores"]
    return _run([*step, "--time=10", sys.executable, str(runs.CLONE / "launch.py"), *words])


def jobs_in(run: Path) -> list[str]:
    """Ids of all jobs in the queue that start in the folder of a run."""
    rows = slurm.call("squeue", "--noheader", "--format", "%i %Z").splitlines()
    return [row.split()[0] for row in rows if row.split(maxsplit=1)[1].startswith(f"{run}/")]


def _run(command: Sequence[str], more: dict[str, str] | None = None) -> Launched:
    try:
        return subprocess.run(
            command, env=os.environ | (more or {}), capture_output=True, text=True, timeout=LAUNCH_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{shlex.join(command)}: no end after {LAUNCH_S:g} s: {error.stderr!r}") from error
