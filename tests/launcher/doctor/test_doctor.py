"""`muster doctor`: what it finds on a machine made for the test, the judgement of each finding, and the whole command."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from conf.files import write_json
from conf.schema import Config
from jobs import probe
from launcher import __main__ as muster
from launcher.doctor import examine, machine, nodes, services, site, training
from launcher.doctor.check import Check, Level
from launcher.hub_client import Reply, Unreachable
from tests.conftest import Compose, Programs, put

GPU = {"name": "NVIDIA H200", "memory_gib": 139.8, "free_gib": 139.0, "capability": "9.0"}
FOUND: dict[str, Any] = {
    "python": "3.11.7",
    "packages": dict.fromkeys((*training.NEEDED, *training.FOR, "wandb"), "1.0"),
    "cuda": "12.8",
    "hip": None,
    "nccl": "2.27.3",
    "gpus": [GPU],
    "operations": [{"name": "attention", "works": True, "detail": "right on cuda", "seconds": 0.1}],
}


def levels(checks: list[Check]) -> dict[str, Level]:
    return {check.name: check.level for check in checks if check.level is not Level.green}


def judged(**changes: Any) -> dict[str, Level]:
    return levels(list(training.checks("python", FOUND | changes, 1)))


def test_a_node_that_trains_is_green() -> None:
    assert judged() == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"packages": {"torch": "2"}, "torch_error": "OSError: libcudart"}, {"transformers": Level.red, "torch": Level.red}),
        ({"packages": {name: "1" for name in FOUND["packages"] if name != "peft"}}, {"peft": Level.yellow}),
        ({"gpus": [], "cuda_error": "RuntimeError: driver too old"}, {"GPUs": Level.red}),
        ({"gpus": [], "cuda": None}, {"GPUs": Level.red}),
        ({"gpus": [GPU | {"free_gib": 1.0}]}, {"GPU 0": Level.yellow}),
        ({"operations": [{"name": "attention", "works": False, "detail": "x", "seconds": 0}]}, {"attention": Level.red}),
        ({"operations": [{"name": "bitsandbytes", "works": False, "detail": "x", "seconds": 0}]}, {"bitsandbytes": Level.yellow}),
    ],
)  # fmt: skip
def test_what_does_not_work_has_a_level(changes: dict[str, Any], expected: dict[str, Level]) -> None:
    assert judged(**changes).items() >= expected.items()


def test_a_python_without_the_packages_is_an_error(tmp_path: Path) -> None:
    assert training.ask(str(tmp_path / "none")) == f"{tmp_path}/none is not here"
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named torch' >&2; exit 1\n")
    broken.chmod(0o755)
    answer = training.ask(str(broken))
    assert answer == "ended with 1: No module named torch"
    assert levels(list(training.checks("python", answer, 0))) == {"Python": Level.red}


def test_the_probe_says_that_everything_is_missing(tmp_path: Path) -> None:
    """A Python without any package: the one of this environment, without its site-packages."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    found = training.ask(str(bare))
    assert not isinstance(found, str)
    assert (found["packages"], found["torch_error"]) == ({}, "ModuleNotFoundError: No module named 'torch'")
    assert {name for name, level in levels(list(training.checks("p", found, 1))).items() if level is Level.red} == {
        *training.NEEDED
    }


def test_a_wrong_operation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert probe._tried("attention", lambda: probe._attention(False))["works"]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: torch.zeros(1, 4, 64, 32))
    tried = probe._tried("attention", lambda: probe._attention(False))
    assert (tried["works"], "differs from the formula" in tried["detail"]) == (False, True)


SINFO = "echo 'gpu*|up|2-00:00:00|16|gpu:h100:8'; echo 'cpu|up|infinite|4|(null)'"
SACCTMGR = "echo 'proj1||normal'; echo 'proj2||normal'"


@pytest.mark.parametrize(
    ("partition", "account", "expected"),
    [
        ("gpu", "proj1", {}),
        (None, None, {}),
        ("gpus", "proj1", {"cluster.train.partition": Level.red}),
        ("gpu", "other", {"cluster.account": Level.red}),
    ],
)
def test_slurm_has_the_partition_and_the_account(
    programs: Programs, partition: str | None, account: str | None, expected: dict[str, Level]
) -> None:
    programs(squeue="", scontrol="echo 'slurm 24.11.5'", sinfo=SINFO, sacctmgr=SACCTMGR)
    config = Config()
    config.cluster.train.partition, config.cluster.account = partition, account
    found = list(site.checks(config.cluster, "me", needed=True))
    assert levels(found) == expected
    assert [check.found for check in found if check.name == "partition gpu*"] == [
        "up, 16 nodes, at most 2-00:00:00, gpu:h100:8"
    ]


@pytest.mark.parametrize(("needed", "expected"), [(True, {"commands": Level.red}), (False, {})])
def test_slurm_is_needed_for_its_clusters_only(programs: Programs, needed: bool, expected: dict[str, Level]) -> None:
    programs()
    assert levels(list(site.checks(Config().cluster, "me", needed=needed))) == expected


@pytest.mark.parametrize(
    ("token", "reply", "expected"),
    [
        ("hf_secretsecretsecret", Reply(200), {}),
        ("hf_secretsecretsecret", Reply(401), {"token": Level.red}),
        (None, Reply(401), {"token": Level.yellow}),
        ("hf_secretsecretsecret", Unreachable("no route"), {"network": Level.yellow}),
    ],
)
def test_the_hub_judges_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, reply: Any, expected: dict[str, Level]
) -> None:
    def ask(*_: object) -> Reply:
        if isinstance(reply, Unreachable):
            raise reply
        return reply  # type: ignore[no-any-return]

    monkeypatch.setattr(services.HubClient, "ask", ask)
    environ = {"HF_TOKEN": token} if token else {}
    found = list(services.hub(environ, tmp_path, tmp_path / "hub", offline=False))
    assert levels(found) == expected
    assert "secret" not in str(found)


def test_the_limits_and_disks_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.python((3, 10, 1)).level is Level.red
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**29, "total": 2**29}))
    assert machine.disk("runs", tmp_path / "not/there").level is Level.red
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 1024))
    assert levels(list(machine.limits())) == {
        "open files": Level.yellow,
        "processes": Level.yellow,
        "/dev/shm": Level.yellow,
    } | levels([check for check in machine.limits() if check.name == "locked memory"])
    monkeypatch.setattr(machine.time, "time", lambda: 0.0)
    assert machine.clock(tmp_path).level is Level.yellow


def test_the_text_holds_no_secret_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    text = f"{Path.home()}/x https://me:password1@mirror/ hf_abcdefghijklmnopqrst"
    shown = examine.shown(text)
    assert shown.startswith("~/x")
    assert "password1" not in shown
    assert "abcdefghijkl" not in shown


def test_the_command_exits_with_1_on_an_error(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With a Python that answers at once, in place of minutes of imports."""
    programs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(training, "ask", lambda _: FOUND)
    monkeypatch.setattr(examine, "local_gpus", lambda: 1)
    assert muster.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok       training: GPU 0") and "NVIDIA H200, 139.8 GiB" in line for line in lines)
    assert any(line.startswith("warning  trackers: wandb") for line in lines) or "WANDB_API_KEY" in os.environ
    monkeypatch.setattr(training, "ask", lambda _: "ended with 1: No module named torch")
    assert muster.main(["doctor", "--json"]) == 1
    red = [item for item in json.loads(capsys.readouterr().out) if item["level"] == "error"]
    assert [(item["name"], "pip install" in item["remedy"]) for item in red] == [("Python", True)]


def test_a_cluster_on_slurm_also_checks_a_node(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = programs(
        squeue="",
        sinfo=SINFO,
        sacctmgr=SACCTMGR,
        # the checks of the node of train are answered, those of the cpu node are not; each script has an id of its own
        sbatch=(
            "case $1 in *preflight*) id=7;; *doctor-train*) id=8;; *) id=9;; esac; "
            f"[ $id = 8 ] && /bin/cp {tmp_path}/answer.json ${{1%/*}}/../doctor-train.json; "
            "[ $id = 9 ] && echo 'sh: /opt/python: not found' > ${1%/*}/doctor-cpu.log; echo Submitted batch job $id"
        ),
        srun="",
        scontrol="echo 'slurm 24.11.5'",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(training, "ask", lambda _: FOUND)
    monkeypatch.setattr(examine, "local_gpus", lambda: 1)
    assert muster.main(["doctor", "--cluster", "slurm", "--no-submit"]) == 0
    assert not (folder / "sbatch.calls").exists()
    answer = {"host": "n1", "checks": [asdict(Check("training", "torch", "built for CUDA 12.8, NCCL 2.27.3"))]}
    write_json(tmp_path / "answer.json", answer)
    capsys.readouterr()
    assert muster.main(["doctor", "--cluster", "slurm"]) == 1, "the cpu node did not answer"
    said = capsys.readouterr()
    assert "submitted preflight    7" in said.err
    rows = said.out.splitlines()
    assert rows[0].split("  ")[0] == "login node"
    assert ["ok", "ok", "-", "training:", "torch", "built"] in [row.split()[:6] for row in rows]
    assert any("node: checks  job 9 unknown without an answer: sh: /opt/python: not found" in row for row in rows)
    [script] = tmp_path.glob("runs/doctor-slurm-*/jobs/preflight.sbatch")
    assert "#SBATCH --nodes=1\n" in script.read_text()
    # a refused launch leaves what was found on the login node, and its exit code
    programs(sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1")
    assert muster.main(["doctor", "--cluster", "slurm"]) != 0
    said = capsys.readouterr()
    assert "Invalid account" in said.err
    assert "training: torch" in said.out


def test_login_node_and_compute_nodes_stand_side_by_side() -> None:
    took = [Check("training", "peft", f"can be imported ({seconds} s)") for seconds in (1.5, 20.1)]
    same, login = Check("muster", "version", "1.0"), Check("training", "torch", "missing", Level.yellow, "install it")
    node = Check("training", "torch", "built for CUDA", Level.green)
    places = [
        nodes.Place("login node", [same, login, took[0]]),
        nodes.Place("train on n1", [same, node, took[1], Check("preflight", "ranks", "slow", Level.red, "exclude it")]),
    ]
    assert [line.rstrip() for line, _ in nodes.side_by_side(places, examine.MARKS)] == [
        "login node   train on n1  check",
        "ok           ok           muster: version  1.0",
        "warning      ok           training: torch",
        "                            login node: missing",
        "                            train on n1: built for CUDA",
        "                            -> install it",
        "ok           ok           training: peft  can be imported",
        "-            ERROR        preflight: ranks  slow",
        "                            -> exclude it",
    ]


def test_each_kind_of_node_is_looked_at_once_with_what_its_jobs_get(compose: Compose, tmp_path: Path) -> None:
    overrides = [
        "cluster=slurm",
        "cluster.train.partition=gpu",
        "cluster.inference.partition=gpu",
        "cluster.cpu.partition=cpu",
    ]
    overrides += [
        "cluster.inference.gpu_type=null",
        "cluster.modules=[cuda]",
        "cluster.setup=['ulimit -n 99']",
        "cluster.srun_args=['--mpi=none']",
    ]
    config = put(compose(*overrides, "cluster.python=/opt/my python"), {"run_dir": str(tmp_path)})
    assert nodes.kinds(config) == [("train", "inference"), ("cpu",)]
    name, text = nodes.script(config, ("train", "inference"), tmp_path)
    assert name == "doctor/train"
    lines = text.splitlines()
    for wanted in (
        "--partition=gpu",
        "--gpus-per-node=8",
        "--ntasks-per-node=1",
        "--nodes=1",
        "--job-name=doctor/train",
    ):
        assert f"#SBATCH {wanted}" in lines, text
    assert text.index("module load cuda") < text.index("ulimit -n 99") < text.index("srun --nodes=1 --ntasks=1")
    assert lines[-1].endswith(
        f"'/opt/my python' -u -m launcher.doctor.node {tmp_path}/config.yaml train {tmp_path}/doctor-train.json"
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_node_says_what_its_job_lacks(compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "ask", lambda _: FOUND)
    config = put(compose("cluster=slurm"), {"run_dir": str(tmp_path / "run")})
    found = list(examine.of_node(config, config.cluster.train))
    [gpus] = [check for check in found if check.name == "GPUs of the job"]
    assert (gpus.level, gpus.found) == (Level.red, "torch sees 1, asked for 8")
    assert not [check for check in found if check.topic == "slurm"]
