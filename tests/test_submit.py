"""launcher/submit.py: what reaches sbatch, what is written down, and what happens when Slurm refuses a job."""

import json
import subprocess
from pathlib import Path

import pytest

from conf import resolve
from conf.files import read_json
from launcher import preview, render
from launcher.plan import plan

from .conftest import ROOT, Compose, Launch, Programs, put, tool

WORDS = ("cluster=slurm", "model=llama8b", "parallel=zero3", "pipeline=checked")
JOBS = ["preflight", "preprocess", "train", "consolidate", "evaluate", "generate"]
SBATCH = """
folder="${0%/*}"
if [ -e "$folder/refuse" ] && read -r refused < "$folder/refuse" && [ "${1#*"$refused"}" != "$1" ]; then
  echo "sbatch: error: Batch job submission failed: Invalid partition" >&2; exit 1
fi
number=100
[ -e "$folder/last" ] && read -r number < "$folder/last"
number=$((number + 1))
echo "$number" > "$folder/last"
while IFS= read -r line || [ -n "$line" ]; do printf '%s\\n' "$line"; done < "$1" > "$folder/script.$number"
echo "Submitted batch job $number"
"""


@pytest.fixture
def slurm(programs: Programs) -> Path:
    """A Slurm that takes every script and keeps it beside its commands; it refuses those whose path names what `refuse` says."""
    return programs(sbatch=SBATCH, srun="exit 1", squeue=":", scontrol="exit 1", scancel=":")


def test_every_job_is_submitted_after_those_it_waits_for(launch: Launch, slurm: Path, tmp_path: Path) -> None:
    done = launch(*WORDS, "run_dir=run")
    record = read_json(tmp_path / "run/run.json")["launches"]
    ids = {job: str(101 + number) for number, job in enumerate(JOBS)}
    assert done.returncode == 0, done.stderr
    assert [item["jobs"] for item in record] == [ids]
    assert [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("submitted")] == [
        [*item] for item in ids.items()
    ]


def test_what_was_previewed_is_what_sbatch_gets(launch: Launch, slurm: Path, compose: Compose, tmp_path: Path) -> None:
    launch(*WORDS, "run_dir=run")
    config = resolve.load(tmp_path / "run/config.yaml")
    shown = preview.text(config, plan(config))
    for number, job in enumerate(JOBS):
        script = (slurm / f"script.{101 + number}").read_text()
        for other, parent in enumerate(JOBS):
            script = script.replace(f":{101 + other}", f":<{parent}>")
        waits = [line for line in script.splitlines() if "dependency" in line]
        quoted = script.replace(*2 * [""]) if not waits else script.replace(waits[0], _quoted(waits[0]))
        assert quoted.strip() in shown, job


def _quoted(directive: str) -> str:
    """Angle brackets are what makes shlex quote the value of --dependency."""
    option, _, value = directive.partition("=")
    return f"{option}='{value}'"


def test_the_run_folder_has_what_the_jobs_read(launch: Launch, slurm: Path, tmp_path: Path) -> None:
    launch(*WORDS, "run_dir=run")
    run = tmp_path / "run"
    found = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.json", "code", "jobs", "deepspeed.json"} <= found
    assert {path.name for path in (run / "code").iterdir()} == {"conf", "launcher", "jobs", "slurm_templates"}
    assert all((run / "jobs" / job).is_dir() for job in JOBS)
    assert resolve.load(run / "config.yaml").run_dir == str(run)


def test_the_command_and_where_it_came_from_are_recorded(launch: Launch, slurm: Path, tmp_path: Path) -> None:
    (slurm / "git").symlink_to(tool("git"))
    launch(*WORDS, "run_dir=run")
    [record] = read_json(tmp_path / "run/run.json")["launches"]
    assert record["command"] == [str(ROOT / "launch.py"), *WORDS, "run_dir=run"]
    assert record["cluster"] == "slurm"
    assert set(record) >= {"time", "python"}
    if (ROOT / ".git").exists():
        assert len(record["commit"]) == 40


def test_what_submitit_pickles_are_two_words(launch: Launch, slurm: Path, tmp_path: Path) -> None:
    launch(*WORDS, "run_dir=run")
    for path in (tmp_path / "run").rglob("*.pkl"):
        assert path.stat().st_size < 1_000
        assert b"learning_rate" not in path.read_bytes()
    assert len(list((tmp_path / "run").rglob("*.pkl"))) == len(JOBS)


def test_when_slurm_refuses_a_job_those_before_it_are_cancelled(launch: Launch, slurm: Path) -> None:
    (slurm / "refuse").write_text("/jobs/train/\n")
    done = launch(*WORDS, "run_dir=run")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "launch.py: cluster=slurm: Slurm refused train: "
        "sbatch: error: Batch job submission failed: Invalid partition; cancelled preflight, preprocess"
    ]
    assert (slurm / "scancel.calls").read_text() == "101 102\n"


@pytest.mark.xfail(strict=True, reason="SlurmError is no UserError, and nobody catches it there")
def test_when_cancelling_fails_too_there_is_no_traceback(launch: Launch, slurm: Path) -> None:
    (slurm / "refuse").write_text("/jobs/train/\n")
    (slurm / "scancel").write_text("#!/bin/sh\necho 'scancel: error: no controller' >&2; exit 1\n")
    done = launch(*WORDS, "run_dir=run")
    assert "Invalid partition" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_at_work_is_not_started_twice(launch: Launch, slurm: Path, programs: Programs) -> None:
    launch(*WORDS, "run_dir=run")
    programs(squeue="echo '103|RUNNING'")
    done = launch("resume=run")
    assert done.returncode == 2
    assert "is at work: train 103 is RUNNING" in done.stderr
    assert "python -m launcher cancel" in done.stderr
    assert read_last(slurm) == "106"


def read_last(slurm: Path) -> str:
    return (slurm / "last").read_text().strip()


def test_a_resumed_run_submits_what_is_left(launch: Launch, slurm: Path, compose: Compose, tmp_path: Path) -> None:
    launch(*WORDS, "run_dir=run")
    config = resolve.load(tmp_path / "run/config.yaml")
    for job in ("preflight", "preprocess"):
        folder = tmp_path / "run/jobs" / job
        (folder / "attempt-1").mkdir()
        (folder / "attempt-1.json").write_text(
            json.dumps({"status": "completed", "config": resolve.digest(config), "job_id": "101"})
        )
    done = launch("resume=run")
    launches = read_json(tmp_path / "run/run.json")["launches"]
    assert done.returncode == 0, done.stderr
    assert list(launches[1]["jobs"]) == JOBS[2:]
    assert "dependency" not in (slurm / "script.107").read_text()


def test_a_launch_that_does_not_train_keeps_the_runs_config(launch: Launch, slurm: Path, tmp_path: Path) -> None:
    launch(*WORDS, "run_dir=run")
    before = (tmp_path / "run/config.yaml").read_text()
    done = launch("resume=run", "pipeline=consolidate", "cluster.cpu.memory_gib=7")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert resolve.load(tmp_path / "run/jobs/consolidate/config.yaml").cluster.cpu.memory_gib == 7
    assert "#SBATCH --mem=7G" in (slurm / "script.107").read_text()


@pytest.fixture
def written(launch: Launch, tmp_path: Path) -> Path:
    """RUN/jobs of `submit=script`, in a folder whose name a shell would like to read."""
    run = tmp_path / "it's $HOME"
    done = launch(*WORDS, "submit=script", f"run_dir='{run}'".replace("it's", "it\\'s"))
    assert done.returncode == 0, done.stderr
    return run / "jobs"


def test_scripts_by_hand_are_written_for_every_job_and_submit_nothing(written: Path) -> None:
    assert {path.name for path in written.glob("*.*")} == {*(f"{job}.sbatch" for job in JOBS), "submit.sh"}
    assert read_json(written.parent / "run.json")["launches"][0]["jobs"] == {}
    assert all(path.stat().st_mode & 0o100 for path in written.glob("*.*"))


def test_scripts_by_hand_are_clean(written: Path) -> None:
    for path in written.glob("*.*"):
        subprocess.run([tool("bash"), "-n", str(path)], check=True, timeout=20)
    command = [tool("shellcheck"), "--exclude=SC2016", *map(str, written.glob("*.sbatch")), str(written / "submit.sh")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (checked.stdout, checked.returncode) == ("", 0)


def test_scripts_by_hand_are_what_the_renderer_says(written: Path) -> None:
    config = resolve.load(written.parent / "config.yaml")
    for job in plan(put(config, {"jobs": JOBS})):
        path = written / f"{job.name}.sbatch"
        assert path.read_text() == render.script_text(config, job, written.parent / "config.yaml")
