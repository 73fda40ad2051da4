"""slurm_templates/: the whole batch script in a real bash, with a small program instead of srun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf import resolve
from conf.files import read_json
from conf.schema import Config
from launcher.plan import plan
from launcher.slurm_command import FINDS_THE_CLUSTER
from launcher.submit import render
from launcher.supervise.rendezvous import reserve_port
from tests.conftest import ROOT, Compose, Programs, put, tool

SAY_COMPLETED = f"""
"{sys.executable}" -c '
import os, pathlib
from launcher.supervise import attempt
attempt.record_end(pathlib.Path(os.environ["MUSTER_RUN"], "jobs", os.environ["MUSTER_JOB"]), 1, 0, "completed")'
"""
TAKE_PORT = f"""
"{sys.executable}" -c '
import os
from launcher.supervise.rendezvous import reserve_port
reserve_port(int(os.environ["MASTER_PORT"]), only=True)' 2> "$MUSTER_RUN/refused"
"""
NOTE_ENVIRONMENT = f'{tool("env")} -0 > "$MUSTER_RUN/environment"'


@pytest.fixture(params=["run", """it's "$HOME" `id` & more"""], ids=["plain", "hostile"])
def config(compose: Compose, tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """A run on Slurm, with the parts of its folder that a batch script needs."""
    config = compose("experiment=llama8b_fsdp", "pipeline=train")
    run = tmp_path / request.param
    for name in ("jobs/train", "jobs/preprocess"):
        (run / name).mkdir(parents=True)
    (run / "code").symlink_to(ROOT)
    put(config, {"run_dir": str(run), "cluster.python": sys.executable})
    resolve.save(config, run / "config.yaml")
    return config


def batch(
    config: Config, name: str, *, by_hand: bool = False, environ: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run the script of a job as slurmd would: return exit code and output.

    The process that reserves the port may live a second longer.
    """
    job = next(job for job in plan(config) if job.name == name)
    path = Path(config.run_dir) / "config.yaml"
    script = render.script_text(config, job, path) if by_hand else render.sbatch_text(config, job)
    log = Path(config.run_dir) / "output"
    surroundings = {"PATH": os.environ["PATH"]} | (environ or {})
    with log.open("w") as output:
        done = subprocess.run(
            [tool("bash"), "-s"],
            input=script,
            env=surroundings,
            cwd="/",
            stdout=output,
            stderr=output,
            text=True,
            timeout=30,
        )
    return done.returncode, log.read_text()


def verdict(config: Config, job: str) -> dict[str, object]:
    result = read_json(Path(config.run_dir) / "jobs" / job / "attempt-1.json")
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("by_hand", [False, True], ids=["submitit's", "by hand"])
def test_a_job_completes(config: Config, programs: Programs, by_hand: bool) -> None:
    programs(srun=SAY_COMPLETED)
    assert batch(config, "preprocess", by_hand=by_hand) == (0, "muster: preprocess completed\n")
    result = verdict(config, "preprocess")
    assert (result["status"], result["exit"], result["config"]) == ("completed", 0, resolve.digest(config))


@pytest.mark.parametrize("by_hand", [False, True], ids=["submitit's", "by hand"])
def test_the_verdict_has_the_exit_code_of_srun(config: Config, programs: Programs, by_hand: bool) -> None:
    programs(srun="exit 7")
    assert batch(config, "preprocess", by_hand=by_hand)[0] == 1
    result = verdict(config, "preprocess")
    assert (result["status"], result["exit"]) == ("failed", 7)


def test_a_job_without_srun_fails_with_a_verdict(config: Config, programs: Programs) -> None:
    programs()
    assert batch(config, "preprocess")[0] == 1
    assert verdict(config, "preprocess")["exit"] == 127


def test_srun_gets_the_variables_of_begin(config: Config, programs: Programs) -> None:
    programs(srun=NOTE_ENVIRONMENT)
    batch(config, "train")
    text = (Path(config.run_dir) / "environment").read_text()
    result = dict(item.split("=", 1) for item in text.rstrip("\0").split("\0"))
    assert (result["MUSTER_ATTEMPT"], result["MASTER_ADDR"], result["MUSTER_RUN"]) == ("1", "127.0.0.1", config.run_dir)
    assert 20_000 <= int(result["MASTER_PORT"]) < 32_768


def test_the_port_stays_reserved_while_the_ranks_run(config: Config, programs: Programs) -> None:
    programs(srun=TAKE_PORT)
    batch(config, "train")
    assert "is in use" in (Path(config.run_dir) / "refused").read_text()


def test_nothing_is_started_if_the_attempt_cannot_begin(config: Config, programs: Programs) -> None:
    folder = programs(srun="exit 0")
    with reserve_port(22_000) as reservation:
        port = reservation.getsockname()[1]
        code, output = batch(put(config, {"cluster.network.master_port": port}), "train")
    assert (code, output.count("\n")) == (2, 1)
    assert not (folder / "srun.calls").exists()
    assert f"cluster.network.master_port={port}" in output
    assert f"cluster.network.master_port={port}" in str(verdict(config, "train")["reason"])


@pytest.mark.parametrize(("name", "passed"), [("USR1", "USR1"), ("USR2", "USR2"), ("TERM", "USR1")])
def test_a_signal_to_the_script_reaches_the_ranks_and_the_verdict_is_written(
    config: Config, programs: Programs, name: str, passed: str
) -> None:
    program = "import os, signal, sys, time; signal.signal(signal.SIG" + passed + ", lambda *_: sys.exit(42))"
    program += f"; os.kill(os.getppid(), signal.SIG{name}); time.sleep(20)"
    programs(srun=f'exec "{sys.executable}" -c "{program}"')
    assert batch(config, "train")[0] == 1
    assert verdict(config, "train")["exit"] == 42


def test_sruns_errors_are_kept_and_shown(config: Config, programs: Programs) -> None:
    programs(srun='echo "srun: error: n2: task 3: Killed" >&2; exit 137')
    assert "srun: error: n2: task 3: Killed\n" in batch(config, "train")[1]
    result = verdict(config, "train")
    assert (result["host"], result["rank"], result["log"]) == ("n2", 3, "")


@pytest.mark.parametrize("requeue", [True, False])
def test_a_job_is_requeued_only_with_requeue_true(config: Config, programs: Programs, requeue: bool) -> None:
    show = "echo JobState=RUNNING Restarts=0"
    folder = programs(srun="exit 1", scontrol=f'case "$*" in *"show job"*) {show};; *hostnames*) echo n1;; esac')
    put(config, {"cluster.requeue": requeue})
    batch(config, "train", environ={"SLURM_JOB_ID": "7"})
    assert ("requeue 7" in (folder / "scontrol.calls").read_text()) is requeue
    assert verdict(config, "train")["requeued"] is requeue


def test_a_script_by_hand_starts_the_worker(config: Config, programs: Programs) -> None:
    folder = programs(srun="exit 0")
    batch(config, "train", by_hand=True)
    called = (folder / "srun.calls").read_text()
    assert called.startswith(
        f"--unbuffered --output {config.run_dir}/jobs/train/attempt-1/rank-%t.log --kill-on-bad-exit=1 "
    )
    assert called.endswith(f" {sys.executable} -u -m launcher.supervise.worker train {config.run_dir}/config.yaml\n")


def test_the_chain_submits_each_job_after_its_inputs(config: Config, programs: Programs, tmp_path: Path) -> None:
    folder = programs(sbatch=f'read -r last < "{tmp_path}/last"; echo $((last + 1)) | tee "{tmp_path}/last"')
    (tmp_path / "last").write_text("100\n")
    (folder / "tee").symlink_to(tool("tee"))
    put(config, {"jobs": ["preprocess", "train", "consolidate", "evaluate"]})
    script = render.chain_text(config, plan(config))
    subprocess.run([tool("bash"), "-s"], input=script, text=True, check=True, timeout=20, stdout=subprocess.DEVNULL)
    scripts = f"{config.run_dir}/jobs"
    assert (folder / "sbatch.calls").read_text().splitlines() == [
        f"--parsable {scripts}/preprocess.sbatch",
        f"--parsable --dependency=afterok:101 {scripts}/train.sbatch",
        f"--parsable --dependency=afterok:102 {scripts}/consolidate.sbatch",
        f"--parsable --dependency=afterok:101:103 {scripts}/evaluate.sbatch",
    ]


def test_the_chain_stops_if_sbatch_refuses_a_job(config: Config, programs: Programs) -> None:
    folder = programs(sbatch="echo 'sbatch: error: no such partition' >&2; exit 1")
    script = render.chain_text(config, plan(config))
    done = subprocess.run([tool("bash"), "-s"], input=script, text=True, timeout=20, capture_output=True)
    assert done.returncode == 1
    assert len((folder / "sbatch.calls").read_text().splitlines()) == 1


BANNER = "echo 'Welcome to the cluster'; echo '--> job 3 of at most 50...OK'; echo '101;big'; echo '--> Good luck'"


def test_the_chain_finds_the_id_among_the_lines_of_a_site(config: Config, programs: Programs) -> None:
    folder = programs(sbatch=BANNER)
    put(config, {"jobs": ["preprocess", "train"]})
    script = render.chain_text(config, plan(config))
    done = subprocess.run([tool("bash"), "-s"], input=script, text=True, check=True, timeout=20, capture_output=True)
    assert done.stdout == "preprocess 101\ntrain 101\n"
    assert "--dependency=afterok:101 " in (folder / "sbatch.calls").read_text()


def test_the_chain_passes_on_nothing_of_a_surrounding_job(
    config: Config, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = programs(sbatch='set > "$0.set"; echo 101')
    own = (
        "SLURM_JOB_ID",
        "SLURM_CPU_BIND_TYPE",
        "SBATCH_PARTITION",
        "PMIX_RANK",
        "MUSTER_STOP_AT",
        "CUDA_VISIBLE_DEVICES",
    )
    for name in (*own, *FINDS_THE_CLUSTER):
        monkeypatch.setenv(name, "outer")
    script = render.chain_text(config, plan(config))
    subprocess.run([tool("bash"), "-s"], input=script, text=True, check=True, timeout=20, stdout=subprocess.DEVNULL)
    outer = {line.partition("=")[0] for line in (folder / "sbatch.set").read_text().splitlines() if "=" in line}
    assert outer.isdisjoint(own)
    assert outer >= set(FINDS_THE_CLUSTER)


@pytest.mark.site(
    case="Slurm starts a job again that has completed (24.11 after preemption, or an admin)",
    before="the completed training ran once more",
    after="the job ends at once with success, so the jobs after it start",
)
def test_a_completed_job_that_is_started_again_ends_at_once(config: Config, programs: Programs) -> None:
    folder = programs(srun=SAY_COMPLETED)
    environ = {"SLURM_JOB_ID": "7"}
    assert batch(config, "preprocess", environ=environ)[0] == 0
    (folder / "srun.calls").unlink()
    code, output = batch(config, "preprocess", environ=environ | {"SLURM_RESTART_COUNT": "1"})
    assert (code, "has completed, and Slurm started it again" in output) == (0, True)
    assert not (folder / "srun.calls").exists()
    batch(config, "preprocess", environ={"SLURM_JOB_ID": "8"})
    assert (folder / "srun.calls").exists()  # another submission runs
