"""Jobs that end before a rank can say why: the verdict has the line that says it, is not repeated, and status exits with 1."""

import os
import signal
from pathlib import Path

import pytest

from launcher import slurm as commands
from launcher.run_folder import attempts
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
PREFLIGHT = ["pipeline=preflight", "cluster.train.nodes=1", "cluster.train.ranks_per_node=1"]

WITHOUT_ATTEMPT = {
    "module: command not found": pytest.param(
        ["cluster.modules=[cuda/12.8]"],
        "cluster.modules=[]",
        marks=pytest.mark.site(
            "`cluster.modules`, and batch shells have no `module`",
            "`status` showed `failed` and no reason, and exited with 0",
            "a user's error with that line and what to do; `status` exits with 1",
        ),
    ),
    "/opt/conda/envs/muster/bin/python: No such file": pytest.param(
        ["cluster.python=/opt/conda/envs/muster/bin/python"],
        "cluster.python",
        marks=[
            pytest.mark.proof,
            pytest.mark.site(
                "`cluster.python` is not on the compute node",
                "`status` showed `failed` and no reason, and exited with 0",
                "a user's error with that path; `status` exits with 1",
            ),
        ],
    ),
    "/opt/site.sh: No such file": pytest.param(
        ['cluster.setup=["source /opt/site.sh || exit 2"]'],
        "cluster.setup",
        marks=[
            pytest.mark.proof,
            pytest.mark.site(
                "A line of `cluster.setup` fails",
                "`status` showed `failed` and no reason, and exited with 0",
                "a user's error with the line of the script; `status` exits with 1",
            ),
        ],
    ),
    "no licence today": pytest.param(
        ['cluster.setup=["{ echo no licence today; exit 3; }"]'],
        "cluster.setup",
        marks=[
            pytest.mark.proof,
            pytest.mark.site(
                "A line of `cluster.setup` ends the script with a message of its own",
                "`status` showed `failed` and no reason, and exited with 0",
                "a user's error with the last line that was printed",
            ),
        ],
    ),
}
WITH_ATTEMPT = {
    "mutually exclusive": pytest.param(
        ["cluster.train.memory_gib=2", "cluster.setup=[export SLURM_MEM_PER_CPU=500]"],
        "cluster.srun_args",
        marks=pytest.mark.site(
            "Srun refuses the environment (`srun: fatal: ...`)",
            "the verdict blamed memory or a cancellation, and the job was restarted three times",
            "a user's error with srun's line, and no restart",
        ),
    ),
    "unrecognized option '--nonsense'": pytest.param(
        ["cluster.srun_args=[--nonsense]"],
        "cluster.srun_args",
        marks=[
            pytest.mark.proof,
            pytest.mark.site(
                "`cluster.srun_args` has an option that srun does not know",
                "the verdict blamed memory or a cancellation, and the job was restarted three times",
                "a user's error with srun's line, and no restart",
            ),
        ],
    ),
    "Unable to create step": pytest.param(
        ["cluster.srun_args=[--cpus-per-task=64]"],
        "cluster.srun_args",
        marks=[
            pytest.mark.proof,
            pytest.mark.site(
                "Srun is unable to create the step",
                "the verdict blamed memory or a cancellation, and the job was restarted three times",
                "a user's error with srun's line, and no restart",
            ),
        ],
    ),
    "No module named": pytest.param(
        ["cluster.python=/usr/bin/python3"],
        "cluster.python",
        marks=[
            pytest.mark.proof,
            pytest.mark.site(
                "`cluster.python` has no Muster packages",
                "the verdict blamed memory or a cancellation, and the job was restarted three times",
                "a user's error that names the package, and no restart",
            ),
        ],
    ),
}


@pytest.mark.parametrize(("overrides", "key"), WITHOUT_ATTEMPT.values(), ids=WITHOUT_ATTEMPT)
def test_a_script_that_dies_at_once_has_a_verdict(
    overrides: list[str], key: str, request: pytest.FixtureRequest, slurm: Cluster, tmp_path: Path
) -> None:
    run, line = tmp_path / "run", request.node.callspec.id
    runs.start(run, *PREFLIGHT, *overrides)
    verdict = runs.final_verdict(run, "preflight", 60)
    assert attempts.newest_attempt(run / "jobs/preflight") is None
    assert verdict["status"] == "user_error"
    assert line in verdict["reason"]
    assert key in verdict["remedy"]
    shown = runs.command("status", run)
    assert shown.returncode == 1
    assert line in shown.stdout
    assert key in runs.command("why", run).stdout


@pytest.mark.parametrize(("overrides", "key"), WITH_ATTEMPT.values(), ids=WITH_ATTEMPT)
def test_a_step_that_does_not_start_is_not_repeated(
    overrides: list[str], key: str, request: pytest.FixtureRequest, slurm: Cluster, tmp_path: Path
) -> None:
    run, line = tmp_path / "run", request.node.callspec.id
    runs.start(run, *PREFLIGHT, *overrides)
    verdict = runs.final_verdict(run, "preflight", 60)
    assert (verdict["status"], verdict["requeued"], verdict["attempt"]) == ("user_error", False, 1)
    assert line in verdict["reason"]
    assert key in verdict["remedy"]
    assert runs.command("status", run).returncode == 1


@pytest.mark.proof
def test_the_remedy_for_a_shell_without_modules_works(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "modules.sh").write_text("module() { echo module $*; }\n")
    setup = f'cluster.setup=["source {tmp_path}/modules.sh", "module load cuda/12.8 || exit 2"]'
    runs.complete(tmp_path / "run", *PREFLIGHT, "cluster.modules=[]", setup)


@pytest.mark.site(
    "A job is cancelled while it waits, or a job before it has failed",
    "`status` showed `cancelled` and no reason, and exited with 0",
    "one line says which of the two; `status` exits with 1",
)
def test_a_cancelled_job_says_why(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.start(run, "jobs=[preprocess,train]", "cluster.cpu.sbatch={begin: now+1hour}")
    commands.call("scancel", runs.job_id(run, "preprocess"))
    states = runs.finish(run, 60)
    reasons = {name: job.verdict["reason"] for name, job in states.items() if job.verdict}
    assert reasons["preprocess"].startswith("cancelled")
    assert reasons["train"] == "not started: a job that it needs did not complete"
    assert runs.command("status", run).returncode == 1


@pytest.mark.proof
@pytest.mark.site(
    "Slurm kills everything of a job at once (memory of the batch step, a lost node without requeue)",
    "`status` showed Slurm's state and no reason, and exited with 0",
    "the state in plain words with the last lines of the log; `status` exits with 1",
)
def test_a_job_that_ends_without_a_verdict_says_so(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.start(run, *PREFLIGHT, "cluster.requeue=false", 'cluster.setup=["sleep 60"]')
    runs.wait_until(lambda: runs.processes(f"/job0*{runs.job_id(run, 'preflight')}/slurm_script$"))
    for pid in runs.processes(f"/job0*{runs.job_id(run, 'preflight')}/slurm_script$"):
        os.kill(pid, signal.SIGKILL)
    verdict = runs.final_verdict(run, "preflight", 60)
    assert verdict["status"] in ("failed", "user_error")
    assert "the batch script ended" in verdict["reason"]
    assert runs.command("status", run).returncode == 1
