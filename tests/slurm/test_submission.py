"""Launches, cancels and signals on a real Slurm that stalls, from inside a job, twice at once, and with a reused job id."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import slurm as commands
from launcher.run_folder import attempts
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PREFLIGHT = "pipeline=preflight"
LATER = "cluster.train.sbatch={begin: now+1hour}"


@contextmanager
def stalled(cluster: Cluster, seconds: float) -> Iterator[None]:
    """Stop the controller with SIGSTOP now, and let it go on after some seconds: it takes requests, and answers none."""
    pid = cluster.daemons["slurmctld"].pid()
    assert pid
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.proof
@pytest.mark.site(
    case="The controller stalls for 90 seconds during a launch",
    before="the launch failed; the job was queued all the same, and failed for lack of its files",
    after="the launch waits, finds the job that was queued and takes it",
)
def test_a_launch_while_the_controller_stalls_starts_each_job_once(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with stalled(slurm, 90):
        done = runs.launch(f"run_dir={run}", PREFLIGHT, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("Slurm does not answer") == 1
    assert runs.final_verdict(run, "preflight")["status"] == "completed"
    listed = commands.call("squeue", "--noheader", "--states=all", "--format", "%i|%Z").splitlines()
    assert [line.partition("|")[0] for line in listed if line.endswith(f"{run}/code")] == [
        runs.job_id(run, "preflight")
    ]
    assert not list(run.glob("jobs/preflight/.submission_file_*"))
    assert list(run.glob("jobs/preflight/*_submitted.pkl"))


@pytest.mark.proof
@pytest.mark.site(
    case="The controller does not answer when a preempted training asks to be requeued",
    before="the training ended for good after the first error, although it had saved its work",
    after="it asks again for as long as the job lives",
)
def test_a_training_is_requeued_although_the_controller_stalls(whole: Path, start: runs.Start, slurm: Cluster) -> None:
    run = start()
    runs.wait_until(lambda: runs.step(run) >= 5)
    with stalled(slurm, 75):
        for pid in runs.ranks(
            run
        ).values():  # not by scancel: the controller would send the signal once more afterwards
            os.kill(pid, signal.SIGUSR2)
        runs.wait_until(lambda: (run / "jobs/train/attempt-1.json").exists())
    assert runs.final_verdict(run, "train")["status"] == "completed"
    assert [item["status"] for item in attempts.verdicts(run / "jobs/train")] == ["preempted", "completed"]
    assert runs.fingerprints(run) == runs.fingerprints(whole)


@pytest.mark.parametrize("outer", ["salloc", pytest.param("srun", marks=pytest.mark.proof)])
def test_a_launch_inside_a_job_is_as_one_outside(outer: str, slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    leak = ("SLURM_CPU_BIND=quiet,mask_cpu:0x1", "SLURM_CPU_BIND_TYPE=mask_cpu:", "SBATCH_PARTITION=none")
    words = [outer, "-Q", "-N1", "-n1", "--cpus-per-task=2", "--mem-per-cpu=500", "-t", "5", "env", *leak]
    words += [sys.executable, runs.CLONE / "launch.py", *runs.TWO_BY_TWO, PREFLIGHT]
    words += [f"run_dir={run}", "cluster.train.memory_gib=2"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.final_verdict(run, "preflight")["status"] == "completed"


def test_a_completed_job_that_is_requeued_ends_at_once(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.complete(run, PREFLIGHT)
    job_id = runs.job_id(run, "preflight")
    commands.requeue(job_id)
    runs.wait_until(lambda: commands.show_job(job_id)["Restarts"] == "1" and not runs.is_active(run))
    assert commands.show_job(job_id)["JobState"] == "COMPLETED"
    assert [item["status"] for item in attempts.verdicts(run / "jobs/preflight")] == ["completed"]
    assert not (run / "jobs/preflight/attempt-2").exists()


def test_cancel_leaves_the_job_of_another_run_alone(slurm: Cluster, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    runs.start(new, PREFLIGHT, LATER)
    job_id = runs.job_id(new, "preflight")
    (old / "code").mkdir(parents=True)
    (old / "run.json").write_text(json.dumps({"launches": [{"cluster": "slurm", "jobs": {"preflight": job_id}}]}))
    shown = runs.command("status", old)
    assert f"its id {job_id} now belongs to another job" in shown.stderr
    assert runs.command("cancel", old).stdout == "cancelled 0 jobs\n"
    assert runs.job_states(new)["preflight"].state == "PENDING"
    assert runs.command("cancel", new).stdout == "cancelled 1 job\n"
    assert runs.job_states(new)["preflight"].state == "CANCELLED"


def test_two_launches_at_once_queue_one_run(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(lambda _: runs.launch(f"run_dir={run}", PREFLIGHT, LATER), range(2))]
    assert sorted(item.returncode for item in done) == [0, 2], [item.stderr for item in done]
    refused = next(item for item in done if item.returncode)
    assert "is used by process" in refused.stderr or "is already running" in refused.stderr
    listed = commands.call("squeue", "--noheader", "--format", "%Z").splitlines()
    assert listed.count(f"{run}/code") == 1
    runs.command("cancel", run)


def test_the_plain_script_queues_the_chain(slurm: Cluster, tmp_path: Path) -> None:
    """RUN/jobs/submit.sh, inside a job, behind a site's sbatch that prints a banner."""
    run, bin_folder = tmp_path / "run", tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "sbatch").write_text(
        '#!/bin/bash\necho "--> job 3 of at most 50"\n/usr/bin/sbatch "$@"\necho "--> OK"\n'
    )
    (bin_folder / "sbatch").chmod(0o755)
    later = "cluster.cpu.sbatch={begin: now+1hour}"
    runs.start(run, "submit=script", "jobs=[preprocess,train]", later, "train.steps=20")
    env = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SBATCH_PARTITION": "none",
        "SLURM_MEM_PER_CPU": "7",
    }
    done = subprocess.run(["bash", run / "jobs/submit.sh"], capture_output=True, text=True, env=env, check=True)
    ids = dict(line.split() for line in done.stdout.splitlines())
    assert list(ids) == ["preprocess", "train"], done.stdout
    assert commands.show_job(ids["train"])["Dependency"].startswith(f"afterok:{ids['preprocess']}")
    commands.cancel(ids.values())
