"""launcher/submit/submit.py: what sbatch gets, what is recorded, and what happens if Slurm refuses a job."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from conf import resolve
from conf.files import read_json
from conf.schema import Config
from launcher.plan import plan
from launcher.submit import preview, render
from tests.conftest import ROOT, Launch, Programs, bare, put, python, tool, write_programs

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


SLURM = {"sbatch": SBATCH, "srun": "exit 1", "squeue": ":", "scontrol": "exit 1", "scancel": ":"}
"""Stands for Slurm: keeps every script that it gets. Refuses scripts whose path contains the text in the file `refuse`."""


class Submitted(NamedTuple):
    """The output of a launch, its run folder, and the folder of the Slurm commands."""

    done: "subprocess.CompletedProcess[str]"
    run: Path
    slurm: Path
    config: Config

    def script(self, job: str) -> str:
        """Return the script that sbatch got for a job."""
        return (self.slurm / f"script.{101 + JOBS.index(job)}").read_text().rstrip("\n")


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """One launch of every job on Slurm, shared by several tests."""
    base = tmp_path_factory.mktemp("submitted")
    env = bare(base)
    slurm, run = write_programs(base / "bin", **SLURM), base / "run"
    (slurm / "git").symlink_to(tool("git"))
    done = python(ROOT / "launch.py", *WORDS, f"run_dir={run}", cwd=base, env=env)
    assert done.returncode == 0, done.stderr
    return Submitted(done, run, slurm, resolve.load(run / "config.yaml"))


def test_every_job_is_submitted_and_its_id_recorded(submitted: Submitted) -> None:
    ids = {job: str(101 + number) for number, job in enumerate(JOBS)}
    assert [item["jobs"] for item in read_json(submitted.run / "run.json")["launches"]] == [ids]
    submitted_lines = [line.split()[1:] for line in submitted.done.stdout.splitlines() if line.startswith("submitted")]
    assert submitted_lines == [[*item] for item in ids.items()]


@pytest.mark.parametrize("name", JOBS)
def test_sbatch_gets_the_previewed_text(submitted: Submitted, name: str) -> None:
    job = next(job for job in plan(submitted.config) if job.name == name)
    ids = [str(101 + JOBS.index(parent)) for parent in job.after]
    assert submitted.script(name) == render.sbatch_text(submitted.config, job, ids).rstrip("\n")
    shown = preview.text(submitted.config, [job])
    assert render.sbatch_text(submitted.config, job, [f"<{parent}>" for parent in job.after]) in shown


def test_the_run_folder_has_all_inputs_of_the_jobs(submitted: Submitted) -> None:
    run = submitted.run
    assert {"config.yaml", "run.json", "code", "jobs", "deepspeed.json"} <= {path.name for path in run.iterdir()}
    assert {path.name for path in (run / "code").iterdir()} == {
        "conf",
        "pages",
        "launcher",
        "jobs",
        "slurm_templates",
        "for_programs",
    }
    assert all((run / "jobs" / job).is_dir() for job in JOBS)
    assert submitted.config.run_dir == str(run)


def test_the_code_is_copied_without_caches(submitted: Submitted) -> None:
    copied = {
        path.relative_to(submitted.run / "code") for path in (submitted.run / "code").rglob("*") if path.is_file()
    }
    assert Path("jobs/backends/zero.py") in copied
    assert not [path for path in copied if "__pycache__" in path.parts or path.name.startswith(".")]
    program = Path("for_programs/muster")  # the one package that a program of the user can import
    assert {path for path in copied if path.is_relative_to(program.parent)} >= {program / "program.py"}
    originals = {
        path: ROOT / (path.relative_to("for_programs") if path.is_relative_to("for_programs") else path)
        for path in copied
    }
    assert all(
        (submitted.run / "code" / path).read_bytes() == original.read_bytes() for path, original in originals.items()
    )


def test_the_command_and_the_commit_are_recorded(submitted: Submitted) -> None:
    [record] = read_json(submitted.run / "run.json")["launches"]
    assert record["command"] == [str(ROOT / "launch.py"), *WORDS, f"run_dir={submitted.run}"]
    assert (record["cluster"], record["python"]) == ("slurm", sys.version.split()[0])
    if (ROOT / ".git").exists():
        assert len(record["commit"]) == 40
        assert record["modified"] is bool((submitted.run / "code.diff").read_text())


def test_submitit_pickles_only_two_strings(submitted: Submitted) -> None:
    pickles = [path.read_bytes() for path in submitted.run.rglob("*.pkl")]
    assert len(pickles) == len(JOBS)
    assert all(len(text) < 1_000 and b"learning_rate" not in text for text in pickles)


@pytest.fixture
def slurm(programs: Programs) -> Path:
    """The commands of SLURM, for one test."""
    return programs(**SLURM)


def test_if_slurm_refuses_a_job_the_jobs_before_it_are_cancelled(launch: Launch, slurm: Path) -> None:
    (slurm / "refuse").write_text("/jobs/train/\n")
    done = launch(*WORDS, "run_dir=run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "launch.py: cluster=slurm: Slurm refused train: "
        "sbatch: error: Batch job submission failed: Invalid partition; cancelled preflight, preprocess"
    )
    assert (slurm / "scancel.calls").read_text() == "101 102\n"


def test_if_cancelling_fails_too_there_is_no_traceback(launch: Launch, slurm: Path) -> None:
    (slurm / "refuse").write_text("/jobs/train/\n")
    (slurm / "scancel").write_text("#!/bin/sh\necho 'scancel: error: no controller' >&2; exit 1\n")
    done = launch(*WORDS, "run_dir=run")
    assert "Invalid partition" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_launch_leaves_no_half_of_a_chain(
    launch_process: Launch, slurm: Path, programs: Programs
) -> None:
    programs(sbatch=f'case "$1" in */jobs/train/*) kill -INT $PPID; exit 1;; esac\n{SBATCH}')
    done = launch_process(*WORDS, "run_dir=run")
    assert done.returncode == 130
    assert done.stderr.startswith("cancelled preflight, preprocess\nlaunch.py: stopped\n")
    assert (slurm / "scancel.calls").read_text() == "101 102\n"


def test_a_running_run_is_not_started_twice(launch: Launch, slurm: Path, programs: Programs) -> None:
    launch(*WORDS, "run_dir=run")
    programs(squeue="echo '103|RUNNING'")
    done = launch("resume=run")
    assert done.returncode == 2
    assert "is already running: train 103 is RUNNING" in done.stderr
    assert "muster cancel" in done.stderr
    assert (slurm / "last").read_text() == "106\n"


def test_resume_submits_the_jobs_that_are_left(launch: Launch, slurm: Path, tmp_path: Path) -> None:
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
    (tmp_path / "run/checkpoints/step-00000005").mkdir(parents=True)
    done = launch("resume=run", "pipeline=consolidate", "cluster.cpu.memory_gib=7")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert resolve.load(tmp_path / "run/jobs/consolidate/config.yaml").cluster.cpu.memory_gib == 7
    assert "#SBATCH --mem=7G" in (slurm / "script.107").read_text()


@pytest.mark.site(
    case="launch.py runs inside a job: salloc, a step, a tmux that was started in one",
    before="variables of that job went into the new one: srun refused, or bound all ranks to one core",
    after="sbatch gets an environment without them",
)
def test_sbatch_gets_nothing_of_a_surrounding_job(launch: Launch, slurm: Path, programs: Programs) -> None:
    programs(sbatch=f'set > "$0.set"\n{SBATCH}')
    outer = {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_CPU": "500", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "PMIX_RANK": "0"}
    done = launch(*WORDS, "run_dir=run", env=outer | {"SLURM_CONF": "/etc/slurm.conf"})
    assert done.returncode == 0, done.stderr
    seen = {line.partition("=")[0] for line in (slurm / "sbatch.set").read_text().splitlines()}
    assert {name for name in seen if name.startswith(("SLURM", "PMI"))} == {"SLURM_CONF"}


@pytest.mark.site(
    case="A profile sets SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_EXPORT, ...",
    before="they won over the script that the dry run had shown",
    after="sbatch does not get them; the launch names each with the key that does the same",
)
def test_variables_of_a_profile_are_named_and_their_remedy_works(
    launch: Launch, slurm: Path, programs: Programs
) -> None:
    profile = {"SBATCH_ACCOUNT": "proj1", "SBATCH_PARTITION": "debug", "SBATCH_RESERVATION": "monday"}
    programs(sbatch=f'set > "$0.set"\n{SBATCH}')
    for words in (("dry_run=true",), ()):
        done = launch(*WORDS, "run_dir=run", *words, env=profile)
        named = [line for line in done.stdout.splitlines() if line.startswith("ignored")]
        assert len(named) == 3, done.stdout
    assert "SBATCH_" not in (slurm / "sbatch.set").read_text()
    remedies = [line.partition("To use it: ")[2] for line in named]
    done = launch(*WORDS, "run_dir=other", "dry_run=true", *remedies)
    for directive in ("account=proj1", "partition=debug", "reservation=monday"):
        assert f"#SBATCH --{directive}\n" in done.stdout


def test_a_banner_of_sbatch_is_not_taken_for_an_id(
    launch: Launch, slurm: Path, programs: Programs, tmp_path: Path
) -> None:
    programs(sbatch=f"echo '--> This is job 3 of at most 50 in the queue...OK'\n{SBATCH}")
    assert launch(*WORDS, "run_dir=run").returncode == 0
    [recorded] = read_json(tmp_path / "run/run.json")["launches"]
    assert list(recorded["jobs"].values()) == [str(number) for number in range(101, 107)]
    assert recorded["slurm"]["train"]["folder"] == "code"


@pytest.mark.site(
    case="Two launches of the same run at the same time",
    before="both wrote the folder and started a training in it",
    after="the second one says which process on which host holds the run",
)
def test_two_launches_at_once_start_one_run(launch_process: Launch, slurm: Path, programs: Programs) -> None:
    programs(sbatch=f"{SBATCH}\n{tool('sleep')} 0.3")
    with ThreadPoolExecutor(4) as pool:
        done = [*pool.map(lambda _: launch_process(*WORDS, "run_dir=run"), range(4))]
    first = [item for item in done if item.returncode == 0]
    assert len(first) == 1, [item.stderr for item in done]
    for item in done:
        if item.returncode:
            assert item.returncode == 2
            assert "Traceback" not in item.stderr
            assert "is used by process" in item.stderr or "is already running" in item.stderr
    assert (slurm / "last").read_text() == "106\n"


@pytest.mark.site(
    case="A project is reached through a symbolic link",
    before="resume through the link started a second training",
    after="both paths are the same run",
)
def test_a_run_has_one_name_through_a_symbolic_link(
    launch: Launch, slurm: Path, programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    launch(*WORDS, f"run_dir={tmp_path}/link/run")
    for path in ("link", "real"):
        programs(squeue=f"echo '103|RUNNING|me|llama8b-sample-zero3/train|{tmp_path}/link/run/code'")
        for words in ([f"resume={tmp_path}/{path}/run"], [*WORDS, f"run_dir={tmp_path}/{path}/run"]):
            done = launch(*words)
            assert (done.returncode, "already running: train 103" in done.stderr) == (2, True), done.stderr
    assert (slurm / "last").read_text() == "106\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/jobs of `submit=script` on a machine without Slurm, in a folder whose name has characters special to a shell."""
    base = tmp_path_factory.mktemp("written")
    env, run = bare(base), base / "it's $HOME"
    word = "run_dir='{}'".format(str(run).replace("'", "\\'"))
    done = python(ROOT / "launch.py", *WORDS, "submit=script", word, cwd=base, env=env)
    assert done.returncode == 0, done.stderr
    return run / "jobs"


def test_scripts_by_hand_are_written_for_every_job_and_submit_nothing(written: Path) -> None:
    assert {path.name for path in written.glob("*.*")} == {*(f"{job}.sbatch" for job in JOBS), "submit.sh"}
    assert read_json(written.parent / "run.json")["launches"][0]["jobs"] == {}
    assert all(path.stat().st_mode & 0o100 for path in written.glob("*.*"))


def test_scripts_by_hand_pass_shellcheck(written: Path) -> None:
    scripts = [*written.glob("*.sbatch"), written / "submit.sh"]
    for path in scripts:
        subprocess.run([tool("bash"), "-n", str(path)], check=True, timeout=20)
    command = [tool("shellcheck"), "--exclude=SC2016", *map(str, scripts)]  # SC2016: a $ in single quotes is the point
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (checked.stdout, checked.returncode) == ("", 0)


def test_scripts_by_hand_equal_the_rendered_text(written: Path) -> None:
    config = resolve.load(written.parent / "config.yaml")
    for job in plan(put(config, {"jobs": JOBS})):
        path = written / f"{job.name}.sbatch"
        assert path.read_text() == render.script_text(config, job, written.parent / "config.yaml")
