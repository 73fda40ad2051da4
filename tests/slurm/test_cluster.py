"""Tests of the test cluster itself: it is a real Slurm, it can be broken and repaired, and it leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import cluster, machine
from .cluster import ROOT
from .daemon import ClusterError, wait

pytestmark = pytest.mark.slurm
DAEMONS = {"slurmctld", "slurmd", "slurmstepd", "slurmscriptd", "slurmdbd", "munged", "mariadbd"}


@pytest.fixture(autouse=True)
def free_machine() -> Iterator[None]:
    """Skip the test unless it may start and stop clusters on this machine."""
    if reason := cluster.available():
        pytest.skip(reason)
    if up := [root for root in machine.roots() if cluster.running(root)]:
        pytest.skip(
            f"A cluster is already up in {up[0]}, and a machine has room for one: take it down with make slurm-down."
        )
    cluster.down()
    yield
    cluster.down()


def eventually(condition: Callable[[], bool], timeout_s: float = 15) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return done


def reaches(address: str) -> bool:
    """Whether the login node can connect to the slurmd at this address."""
    try:
        socket.create_connection((address, 6818), timeout=0.5).close()
    except OSError:
        return False
    return True


def traces() -> dict[str, object]:
    """Everything that a cluster could leave behind on the machine."""
    processes = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, state = status.read_text().partition("(")[2].rpartition(")")[::2]
        except OSError:  # it ended meanwhile
            continue
        if name in DAEMONS and state.split()[0] != "Z":
            processes.add(f"{status.parent.name} {name}")
    return {
        "namespaces": sorted(machine.NAMESPACES.glob("*")),
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if "netns" in line],
        "links": sorted(os.listdir("/sys/class/net")),
        "hosts": Path("/etc/hosts").read_bytes(),
        "devices": sorted(Path("/dev").glob("nvidia*")),
        "processes": processes,
        "root": ROOT.exists(),
    }


def test_ranks_have_nodes_addresses_and_gpus() -> None:
    started = cluster.up(nodes=2)
    say = (
        "echo $SLURM_PROCID $(hostname) $(ip -4 -o address show eth0 | tr -s ' ' | cut -d' ' -f4) $CUDA_VISIBLE_DEVICES"
    )
    text = started.run("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "sh", "-c", say)
    assert sorted(text.split("\n")[:-1]) == [
        "0 n1 198.18.77.1/24 0,1",
        "1 n1 198.18.77.1/24 0,1",
        "2 n2 198.18.77.2/24 0,1",
        "3 n2 198.18.77.2/24 0,1",
    ]
    assert started.addresses == {"n1": "198.18.77.1", "n2": "198.18.77.2", "ctl": "198.18.77.253"}


def test_slurm_commands_work_inside_a_job(tmp_path: Path) -> None:
    started = cluster.up(nodes=2)
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\nset -ex\nsrun hostname\nscontrol show hostnames $SLURM_JOB_NODELIST\n"
        "next=$(sbatch --parsable --hold --output=/dev/null --wrap true)\nsqueue --job $next\nscancel $next\n"
        "echo all good\n"
    )
    output = tmp_path / "output"
    started.run("sbatch", "--nodes=2", f"--output={output}", str(script))
    assert eventually(lambda: output.exists() and "all good" in output.read_text()), output.read_text()


def test_sacct_shows_a_completed_job() -> None:
    if reason := cluster.available(accounting=True):
        pytest.skip(reason)
    started = cluster.up(nodes=1, accounting=True)
    job = started.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "true").strip()
    ask = ["sacct", "--noheader", "--allocations", f"--jobs={job}", "--format=State"]
    assert eventually(lambda: started.run(*ask).strip() == "COMPLETED"), started.run(*ask)


def test_up_keeps_a_cluster_with_the_same_settings_and_replaces_another() -> None:
    first = cluster.up(nodes=1)
    controller = first.daemons["slurmctld"].pid()
    assert cluster.up(nodes=1) == first == cluster.running()
    assert first.daemons["slurmctld"].pid() == controller
    assert set(cluster.up(nodes=2).node_states()) == {"n1", "n2"}


def test_nodes_and_controller_can_be_broken_and_repaired() -> None:
    started = cluster.up(nodes=2)
    started.unplug("n2")
    assert [reaches(started.addresses[node]) for node in ("n1", "n2")] == [True, False]
    started.plug("n2")
    assert eventually(lambda: reaches(started.addresses["n2"]))

    job = started.run("sbatch", "--parsable", "--nodelist=n1", "--output=/dev/null", "--wrap", "sleep 100").strip()
    state = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    assert eventually(lambda: started.run(*state).strip() == "RUNNING")
    started.kill_slurmd("n1")
    assert [daemon.name for daemon in started.problems()] == ["slurmd-n1"]
    started.start_slurmd("n1")
    started.restart_controller()
    assert started.run(*state).strip() == "RUNNING"
    started.crash("n1")
    assert not any(machine.is_on(int(entry.name), ["n1"]) for entry in Path("/proc").glob("[0-9]*"))
    started.start_slurmd("n1")
    assert eventually(lambda: not started.problems()), started.node_states()


def test_down_removes_everything_in_any_state() -> None:
    before = traces()
    command = [sys.executable, cluster.__file__]
    text = subprocess.run([*command, "up", "--nodes=2"], check=True, capture_output=True, text=True).stdout
    assert text.splitlines()[-1] == f"export SLURM_CONF={ROOT}/slurm.conf"
    assert subprocess.run([*command, "status"], stdout=subprocess.DEVNULL).returncode == 0
    started = cluster.running()
    assert started is not None
    assert all(traces()[name] != before[name] for name in before if name != "devices")
    started.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 100")
    assert eventually(lambda: set(started.node_states().values()) == {"mixed"})
    started.daemons["slurmctld"].stop(signal.SIGKILL)
    started.kill_slurmd("n2")
    for _ in range(2):
        subprocess.run([*command, "down"], check=True)
        assert traces() == before
    assert subprocess.run([*command, "status"], stdout=subprocess.DEVNULL).returncode == 1


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for action in (cluster.up, cluster.down):
        with pytest.raises(ClusterError, match="has files that are not a cluster's"):
            action(root=tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_daemon_that_does_not_start_is_named_with_the_end_of_its_log() -> None:
    started = cluster.up(nodes=1)
    with pytest.raises(ClusterError, match=r"(?s)slurmctld .*Running as primary controller"):
        wait(lambda: False, lambda: [started.daemons["slurmctld"]], timeout_s=0)
