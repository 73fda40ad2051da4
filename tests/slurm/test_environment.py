"""The environment variables of every rank in real two-node jobs: submitted, by sbatch by hand, and for two runs at once."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.schema import Config
from launcher.plan import plan
from launcher.submit import render
from tests.conftest import Compose
from tests.launcher.test_site_files import site
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
__all__ = ["site"]  # a fixture


@pytest.fixture(scope="module")
def preflight(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preflight run with 2 x 2 ranks and parallel=zero3."""
    run = tmp_path_factory.mktemp("submitit") / "run"
    runs.complete(run, "pipeline=preflight", "parallel=zero3")
    return run


def test_every_rank_has_the_contract(preflight: Path, slurm: Cluster) -> None:
    ranks = runs.environments(preflight, "preflight")
    assert [variables["RANK"] for variables in ranks] == ["0", "1", "2", "3"]
    assert [variables["LOCAL_RANK"] for variables in ranks] == ["0", "1", "0", "1"]
    assert [variables["NODE_RANK"] for variables in ranks] == ["0", "0", "1", "1"]
    for variables in ranks:
        assert variables["WORLD_SIZE"] == "4"
        assert variables["LOCAL_WORLD_SIZE"] == variables["NODE_WORLD_SIZE"] == "2"
        assert variables["MASTER_ADDR"] in slurm.nodes
        assert 20_000 <= int(variables["MASTER_PORT"]) < 32_768
        assert variables["NCCL_SOCKET_IFNAME"] == "=eth0"
        assert variables["GLOO_SOCKET_IFNAME"] == "eth0"
        assert variables["MUSTER_NCCL_TIMEOUT"] == variables["AXOLOTL_NCCL_TIMEOUT"] == "1800"
        assert variables["DEEPSPEED_TIMEOUT"] == "30"
        assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert variables["OMP_NUM_THREADS"] == variables["SRUN_CPUS_PER_TASK"] == "1"
        assert variables["TRITON_CACHE_DIR"] == f"/tmp/muster-{os.getuid()}/triton"
    assert len({(variables["MASTER_ADDR"], variables["MASTER_PORT"]) for variables in ranks}) == 1


def test_a_script_by_hand_gives_the_same_environment(preflight: Path, slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.start(run, "pipeline=preflight", "parallel=zero3", "submit=script")
    assert not runs.queue()
    done = subprocess.run(
        ["sbatch", "--parsable", "--wait", run / "jobs/preflight.sbatch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    changing = {"MASTER_ADDR", "MASTER_PORT", "MUSTER_RUN", "MUSTER_CONFIG", "MUSTER_STOP_AT"}
    for submitted, by_hand in zip(
        runs.environments(preflight, "preflight"), runs.environments(run, "preflight"), strict=True
    ):
        differing = {key for key in submitted.keys() | by_hand.keys() if submitted.get(key) != by_hand.get(key)}
        own = {
            key for key in differing if str(preflight) in submitted.get(key, "") and str(run) in by_hand.get(key, "")
        }
        assert differing - own <= changing, differing


@pytest.mark.proof
def test_two_runs_on_the_same_nodes_do_not_collide(slurm: Cluster, tmp_path: Path) -> None:
    overrides = ["pipeline=preflight", "cluster.train.sbatch={nodelist: 'n[1-2]'}"]
    both = [tmp_path / "one", tmp_path / "two"]
    for run in both:
        runs.start(run, *overrides)
    for run in both:
        assert runs.final_verdict(run, "preflight")["status"] == "completed"
    ends = [runs.environments(run, "preflight")[0] for run in both]
    assert [end["MASTER_ADDR"] for end in ends] == ["n1", "n1"]
    assert ends[0]["MASTER_PORT"] != ends[1]["MASTER_PORT"]


@pytest.mark.proof
def test_export_none_does_not_empty_the_ranks(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.complete(run, "pipeline=preflight", "cluster.train.sbatch={export: NONE}")
    assert len(runs.environments(run, "preflight")) == 4


def test_a_run_folder_may_have_quotes_blanks_and_dollars(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "it's a $HOME run"
    done = runs.launch(f'run_dir="{run}"', "pipeline=preflight")
    assert done.returncode == 0, done.stderr
    assert runs.final_verdict(run, "preflight")["status"] == "completed"


def test_a_fixed_port_that_is_taken_is_named(slurm: Cluster, tmp_path: Path) -> None:
    listen = "import socket, time; held = socket.create_server(('', 21999)); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen(
        ["nsenter", "--net=/var/run/netns/n1", "python3", "-c", listen], stdout=subprocess.PIPE
    ) as blocker:
        try:
            assert blocker.stdout is not None
            assert blocker.stdout.readline() == b"up\n"
            run = tmp_path / "run"
            runs.start(
                run,
                "pipeline=preflight",
                "cluster.network.master_port=21999",
                "cluster.train.sbatch={nodelist: 'n[1-2]'}",
            )
            verdict = runs.final_verdict(run, "preflight")
        finally:
            blocker.kill()
    assert verdict["status"] == "user_error"
    assert re.search(r"cluster.network.master_port=21999: .*in use.* on n1", verdict["reason"])


@pytest.mark.site(
    case="ranks must meet at another name", before="could not be said", after="`network: {master_suffix: ...}`"
)
def test_ranks_meet_at_the_name_of_the_site(slurm: Cluster, tmp_path: Path) -> None:
    hosts, ours = Path("/etc/hosts"), b"198.18.77.1 n1x\n198.18.77.2 n2x\n198.18.77.3 n3x\n198.18.77.4 n4x\n"
    hosts.write_bytes(ours + hosts.read_bytes())
    try:
        run = tmp_path / "run"
        options = "{nodelist: 'n[1-2]', gpus-per-task: '1', dependency: singleton, overcommit: true}"
        site = [
            "cluster.network.master_suffix=x",
            f"cluster.train.sbatch={options}",
            "cluster.environment={NCCL_DEBUG: INFO}",
        ]
        runs.complete(run, "pipeline=preflight", *site)
    finally:
        hosts.write_bytes(hosts.read_bytes().replace(ours, b""))
    for rank, variables in enumerate(runs.environments(run, "preflight")):
        assert (variables["MASTER_ADDR"], variables["NCCL_DEBUG"]) == ("n1x", "INFO")
        assert variables["CUDA_VISIBLE_DEVICES"] == str(rank % 2)


@pytest.mark.parametrize("name", ["slurm", "mine", "slingshot", "booster", "campus"])
def test_sbatch_understands_every_option_of_the_documented_sites(
    slurm: Cluster, site: Callable[..., Config], name: str, compose: Compose
) -> None:
    config = compose("cluster=slurm", "model=llama8b") if name == "slurm" else site(name, "model=llama8b")
    config.jobs = ["preflight", "preprocess", "train", "consolidate", "evaluate"]
    for job in plan(config):
        command = ["sbatch", "--test-only"]
        done = subprocess.run(
            command, input=render.sbatch_text(config, job), capture_output=True, text=True, check=False
        )
        # The test cluster lacks these partitions, sizes and types, and says so only after it has read all options.
        known = "invalid partition|Requested node configuration|Invalid feature|Invalid account|generic resource|Invalid qos"
        assert done.returncode == 0 or re.search(known, done.stderr), done.stderr


def test_a_job_that_can_never_start_says_so(slurm: Cluster, tmp_path: Path) -> None:
    slurm.run("scontrol", "create", "PartitionName=short", "Nodes=ALL", "MaxTime=10", "State=UP")
    try:
        run = tmp_path / "run"
        runs.start(run, "pipeline=preflight", "cluster.train.partition=short")
        held = tmp_path / "held"
        runs.start(held, "pipeline=preflight", "cluster.train.sbatch={hold: true}")
        shown = [runs.command("why", folder).stdout for folder in (run, held)]
        for folder in (run, held):
            runs.command("cancel", folder)
    finally:
        slurm.run("scontrol", "delete", "PartitionName=short")
    assert (
        "will never start: partition short allows 10 min, and the job asks for 20 min. Set cluster.train.time_min=10"
        in shown[0]
    )
    assert f"Type scontrol release {runs.job_id(held, 'preflight')}" in shown[1]
