"""A sweep on small programs that stand for Slurm's: what sbatch gets, what is recorded, and what the scripts do in a real bash."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from conf import sweep
from conf.files import read_json, write_json
from launcher.run_folder import record
from tests.conftest import ROOT, Launch, bare, python, tool, write_programs
from tests.launcher.submit.test_submit import SLURM

WORDS = ("-m", "cluster=slurm", "model=llama8b", "train.learning_rate=1e-4,2e-4,3e-4", "sweep.at_once=2")
RUNS = [f"train.learning_rate={rate}" for rate in ("1e-4", "2e-4", "3e-4")]
NAMES = ("preprocess", "train", "consolidate", "evaluate", "generate")


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a sweep `sweep` was launched; bin/ has the scripts that sbatch got."""
    base = tmp_path_factory.mktemp("submitted")
    env = bare(base)
    (write_programs(base / "bin", **SLURM) / "git").symlink_to(tool("git"))
    done = python(ROOT / "launch.py", *WORDS, f"run_dir={base}/sweep", cwd=base, env=env)
    assert done.returncode == 0, done.stderr
    (base / "printed").write_text(done.stdout)
    return base


def script(base: Path, name: str) -> str:
    return (base / f"bin/script.{101 + NAMES.index(name)}").read_text()


def option(text: str, name: str) -> str:
    [value] = re.findall(rf"^#SBATCH --{name}=(\S+)$", text, re.MULTILINE)
    return str(value)


def test_one_preprocess_and_one_array_are_submitted(submitted: Path) -> None:
    assert (submitted / "bin/last").read_text() == "105\n"
    array = script(submitted, "train")
    assert (option(array, "array"), option(array, "dependency")) == ("0-2%2", "afterok:101")
    assert (option(array, "job-name"), option(array, "chdir")) == ("sweep/train", f"{submitted}/sweep")
    for number, name in enumerate(RUNS):
        started = record.newest_jobs(submitted / "sweep" / name)
        assert started["train"] == record.StartedJob(f"102_{number}", "slurm", "sweep/train", "..")
        assert set(started) == ({"preprocess", "train"} if number == 0 else {"train"})


def test_the_jobs_of_the_best_run_wait_for_all_trainings(submitted: Path) -> None:
    names = ("consolidate", "evaluate", "generate")
    assert [option(script(submitted, name), "dependency") for name in names] == [
        "afterany:102",
        "afterok:103",
        "afterok:103",
    ]
    content = read_json(submitted / "sweep" / sweep.FILE)
    assert content["jobs"] == {"consolidate": "103", "evaluate": "104", "generate": "105"}
    assert list(content["runs"]) == RUNS
    assert content["runs"][RUNS[1]] == {"train.learning_rate": "2e-4"}


def test_the_command_says_how_to_go_on(submitted: Path) -> None:
    lines = (submitted / "printed").read_text().splitlines()
    assert f"watch     muster status {submitted}/sweep" in lines
    assert f"compare   muster compare {submitted}/sweep" in lines


def run_script(text: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of the sweep, as slurmd would."""
    bash = tool("bash")
    env = {"PATH": f"{Path(bash).parent}:/usr/bin:/bin", **environ}
    return subprocess.run([bash, "-c", text], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def two_runs(submitted: Path, tmp_path: Path) -> str:
    """The text of the array, for a copy of the sweep whose trainings are small programs."""
    for name in RUNS:
        for folder in ("jobs/train", "code"):
            (tmp_path / "sweep" / name / folder).mkdir(parents=True)
        (tmp_path / "sweep" / name / "jobs/train.sbatch").write_text('echo "$PWD $0"; ls ../data; exit 7\n')
    return script(submitted, "train").replace(str(submitted), str(tmp_path))


def test_a_task_runs_the_script_of_its_run_with_the_rows_of_the_first(two_runs: str, tmp_path: Path) -> None:
    first, second = (tmp_path / "sweep" / name for name in RUNS[:2])
    write_json(first / "data/data.json", {})
    (first / "data/link").symlink_to("../../.data/set")
    done = run_script(two_runs, SLURM_ARRAY_JOB_ID="102", SLURM_ARRAY_TASK_ID="1")
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    log = (second / "jobs/train/102_1_0_log.out").read_text()
    assert log == f"{second}/code {second}/jobs/train.sbatch\ndata.json\nlink\n"
    assert (second / "data/link").readlink() == Path("../../.data/set")
    assert not (second / "data").is_symlink()


def test_a_task_without_rows_says_so_in_the_log_of_its_run(two_runs: str, tmp_path: Path) -> None:
    done = run_script(two_runs, SLURM_ARRAY_JOB_ID="102", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 2
    log = (tmp_path / "sweep" / RUNS[2] / "jobs/train/102_2_0_log.out").read_text()
    assert log == f"muster: the preprocess job of {tmp_path}/sweep/{RUNS[0]}/data did not complete\n"
    done = run_script(two_runs, SLURM_ARRAY_JOB_ID="102", SLURM_ARRAY_TASK_ID="3")
    assert (done.returncode, done.stderr) == (2, "muster: no run has the number 3\n")


def test_the_last_job_ends_if_there_is_no_best_run(submitted: Path) -> None:
    done = run_script(script(submitted, "consolidate"), SLURM_JOB_ID="103")
    assert done.returncode == 2
    assert done.stderr == f"muster: no training of {submitted}/sweep has completed, so there is no best one\n"


def test_a_refused_job_cancels_those_before_it(launch: Launch, surroundings: dict[str, str], tmp_path: Path) -> None:
    folder = write_programs(Path(surroundings["PATH"]), **SLURM)
    (folder / "refuse").write_text("/evaluate.sbatch\n")
    done = launch(*WORDS, f"run_dir={tmp_path}/sweep")
    assert done.returncode == 2
    assert (
        "Slurm refused a job: sbatch: error: Batch job submission failed: Invalid partition; cancelled" in done.stderr
    )
    assert (folder / "scancel.calls").read_text() == "101 102 103\n"


@pytest.mark.parametrize(
    ("words", "scripts", "dependency"),
    [
        (["train.seed=0,1"], 1, "afterok:<preprocess>"),
        (["data.max_length=64,128"], 1, "afterany:<preprocess>:<preprocess-2>"),
        (["cluster.train.nodes=1,2"], 2, "afterok:<preprocess>"),
        (["train.seed=0,1", "jobs=[train]"], 1, None),
    ],
    ids=["one set of rows", "two sets of rows", "two sizes", "rows that are there"],
)
def test_runs_that_ask_for_the_same_are_one_array(
    launch: Launch, tmp_path: Path, words: list[str], scripts: int, dependency: str | None
) -> None:
    done = launch("-m", "cluster=slurm", "model=llama8b", "pipeline=train", "dry_run=true", *words)
    assert done.returncode == 0, done.stderr
    arrays = re.findall(r"^#SBATCH --array=(\S+)$", done.stdout, re.MULTILINE)
    assert arrays == (["0-1"] if scripts == 1 else ["0-0", "0-0"])
    own = done.stdout.partition("==== its first run")[0]
    found = {item.strip("'") for item in re.findall(r"^#SBATCH --dependency=(\S+)$", own, re.MULTILINE)}
    assert found == ({dependency} if dependency else set())
    assert list(tmp_path.iterdir()) == []


def test_with_merge_all_each_run_is_merged_after_its_own_training(
    launch: Launch, surroundings: dict[str, str], tmp_path: Path
) -> None:
    folder = write_programs(Path(surroundings["PATH"]), **SLURM)
    words = ["train.seed=0,1", "jobs=[preprocess,train,consolidate]", "sweep.merge=all", f"run_dir={tmp_path}/sweep"]
    done = launch("-m", "cluster=slurm", "model=llama8b", *words)
    assert done.returncode == 0, done.stderr
    found = [option((folder / f"script.{number}").read_text(), "dependency") for number in (102, 103, 104)]
    assert found == ["afterok:101", "afterok:102_0", "afterok:102_1"]
    launches = json.loads((tmp_path / "sweep/train.seed=1/run.json").read_text())["launches"]
    assert launches[0]["jobs"] == {"train": "102_1", "consolidate": "104"}
