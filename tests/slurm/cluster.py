"""Starts and stops a real Slurm cluster of several nodes on one machine: `python tests/slurm/cluster.py up|down|status`.

Each node is a network namespace with its own host name, `eth0` and address; all share the machine's file system. One more
namespace is for the controller, with munge and the database. The root namespace is the login node: after `export SLURM_CONF=...`,
sbatch and the other commands work there as they do inside jobs. A machine can have one cluster. It needs root and a few
Debian packages, which `available` names, but no systemd.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and not __package__:  # PEP 366: a script that imports from its own package
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "slurm"

from . import config, machine
from .daemon import ClusterError, Daemon, daemons, install_database, wait

ROOT = Path("/tmp/muster-slurm")
NETWORK = "198.18.77"  # from the address range reserved for benchmarks, which no real network uses
MAX_NODES = 200
OWNED = ".muster-slurm"  # this file marks a folder of a cluster, which may be deleted


@dataclass(frozen=True)
class Cluster:
    """A cluster with its files in `root`. Returned by `up` and `running`."""

    root: Path
    nodes: list[str]
    accounting: bool

    @property
    def conf(self) -> Path:
        """The value of SLURM_CONF for this cluster."""
        return self.root / "slurm.conf"

    @property
    def addresses(self) -> dict[str, str]:
        """Host name -> IPv4 address, for the nodes and the controller `ctl`."""
        nodes = {node: f"{NETWORK}.{number}" for number, node in enumerate(self.nodes, start=1)}
        return nodes | {config.CONTROLLER: f"{NETWORK}.253"}

    @property
    def daemons(self) -> dict[str, Daemon]:
        """Daemons by name: munged, (mariadbd, slurmdbd,) slurmctld, slurmd-n1, ..."""
        return daemons(root=self.root, nodes=self.nodes, accounting=self.accounting)

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Run a command on the login node and return its output. Raises ClusterError with the output if it fails."""
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        if result.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout

    def node_states(self) -> dict[str, str]:
        """Node -> state as sinfo prints it (`idle`, `mixed`, `down*`, ...). Empty while no controller answers."""
        if self.daemons["slurmctld"].pid() is None:  # sinfo would retry for a while
            return {}
        with suppress(ClusterError, subprocess.TimeoutExpired):
            lines = self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T").splitlines()
            return dict(line.split() for line in lines)
        return {}

    def problems(self) -> list[Daemon]:
        """The daemons that do not run. If all run: the slurmds of nodes that accept no jobs. Empty if all is well."""
        if dead := [daemon for daemon in self.daemons.values() if daemon.pid() is None]:
            return dead
        states = self.node_states()
        usable = re.compile(r"idle|mixed|allocated|completing")
        sick = [node for node in self.nodes if not usable.fullmatch(states.get(node, ""))]
        return [self.daemons[f"slurmd-{node}"] for node in sick]

    def unplug(self, node: str) -> None:
        """Disconnect a node's network. Its processes continue. Slurm marks it as down after SlurmdTimeout, 30 s."""
        machine.set_cable(node, plugged=False)

    def plug(self, node: str) -> None:
        """Connect the node's network again."""
        machine.set_cable(node, plugged=True)

    def kill_slurmd(self, node: str) -> None:
        """Kill -9 only the node's slurmd. Job steps continue."""
        self.daemons[f"slurmd-{node}"].stop(signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Start a node's slurmd again after `kill_slurmd` or `crash`."""
        slurmd = self.daemons[f"slurmd-{node}"]
        slurmd.start()
        wait(lambda: slurmd.pid() is not None, lambda: [slurmd])

    def crash(self, node: str) -> None:
        """Cut a node's power: kill -9 all its processes. Slurm marks it as down after SlurmdTimeout, 30 s.

        Wait for that before `start_slurmd`: with ReturnToService=2, Slurm does not notice jobs lost in a quick reboot.
        """
        machine.kill([node])

    def stop_controller(self) -> None:
        """Stop slurmctld with SIGTERM. Jobs continue."""
        self.daemons["slurmctld"].stop(signal.SIGTERM)

    def start_controller(self) -> None:
        """Start slurmctld from its saved state and wait until it answers. A node is `idle*` until it has answered too."""
        slurmctld = self.daemons["slurmctld"]
        slurmctld.start()
        wait(lambda: bool(self.node_states()), lambda: [slurmctld])

    def restart_controller(self) -> None:
        """Stop and start slurmctld. Jobs continue, and Slurm finds them again."""
        self.stop_controller()
        self.start_controller()

    def down(self) -> None:
        """Stop and remove this cluster."""
        down(self.root)


def available(accounting: bool = False) -> str | None:
    """Why no real Slurm can be started here, in one sentence. None if it can."""
    return machine.missing(accounting)


def running(root: Path = ROOT) -> Cluster | None:
    """The cluster in `root`, if it is up and without problems."""
    cluster = _recorded(root)
    return cluster if cluster and not cluster.problems() else None


def up(nodes: int = 4, accounting: bool = False, root: Path = ROOT) -> Cluster:
    """Start a cluster and wait until all nodes are idle: 1 to 2 s, or 3 to 4 s with accounting (which sacct needs).

    A running cluster with the same settings is returned as it is. Any other cluster is taken down first.
    Raises ClusterError if it cannot start, and then removes everything.
    """
    if reason := available(accounting):
        raise ClusterError(reason)
    if not 1 <= nodes <= MAX_NODES:
        raise ClusterError(f"nodes={nodes}: ask for 1 to {MAX_NODES}")
    cluster = _cluster(nodes, accounting, root)
    with machine.lock():
        if _is_up(cluster):
            return cluster
        _take_down(cluster.root)
        try:
            _start(cluster)
        except BaseException:
            _take_down(cluster.root)
            raise
    return cluster


def down(root: Path = ROOT) -> None:
    """Remove everything of the machine's cluster, whether it is up, half up or gone."""
    with machine.lock():
        _take_down(root.absolute())


def _cluster(nodes: int, accounting: bool, root: Path) -> Cluster:
    return Cluster(root.absolute(), [f"n{number}" for number in range(1, nodes + 1)], accounting)


def _files(cluster: Cluster) -> dict[str, str]:
    return config.files(root=cluster.root, addresses=cluster.addresses, accounting=cluster.accounting)


def _is_up(cluster: Cluster) -> bool:
    """Whether a cluster with exactly these settings is up and without problems."""
    with suppress(OSError):
        same = all((cluster.root / name).read_text() == text for name, text in _files(cluster).items())
        return same and not cluster.problems()
    return False


def _recorded(root: Path) -> Cluster | None:
    """The cluster that the files in `root` describe, up or not."""
    with suppress(OSError):
        nodes = re.findall(r"^NodeName=(\S+)", (root / "slurm.conf").read_text(), re.MULTILINE)
        return Cluster(root.absolute(), nodes, (root / "slurmdbd.conf").exists())
    return None


def _start(cluster: Cluster) -> None:
    root, by_name = cluster.root, cluster.daemons
    root.mkdir(parents=True, exist_ok=True)
    (root / OWNED).touch()
    for folder in ("state", "log", "run", *(f"spool/{node}" for node in cluster.nodes)):
        (root / folder).mkdir(parents=True)
    (root / "munge.key").touch(mode=0o600)
    (root / "munge.key").write_bytes(os.urandom(128))
    for name, text in _files(cluster).items():
        (root / name).write_text(text)
        (root / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)  # slurmdbd refuses to start otherwise
    machine.borrow(cluster.addresses, login_address=f"{NETWORK}.254", gpus=config.GPUS_PER_NODE, root=root)
    if cluster.accounting:
        install_database(root)
    # Each daemon exits, or sleeps for seconds, if the one before it does not answer yet.
    answers = {
        "munged": (root / "run" / "munge.socket").exists,
        "mariadbd": (root / "run" / "mariadb.socket").exists,
        "slurmdbd": lambda: _connects(cluster.addresses[config.CONTROLLER], config.SLURMDBD_PORT),
    }
    for name, daemon in by_name.items():
        daemon.start()
        if name in answers:
            wait(answers[name], lambda: [by_name[name]])  # noqa: B023 (called before the next turn)
    wait(lambda: set(cluster.node_states().values()) == {"idle"} and not cluster.problems(), cluster.problems)


def _connects(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def _take_down(root: Path) -> None:
    roots = {root, *machine.roots()}
    for folder in roots:
        if folder.exists() and any(folder.iterdir()) and not (folder / OWNED).exists():
            raise ClusterError(f"root={folder}: has files that are not a cluster's; choose another folder")
    machine.release()
    for folder in roots:
        if folder.exists():
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != OWNED:  # last, so that an interrupted `down` can be repeated
                    entry.unlink()
            shutil.rmtree(folder)


def _status(root: Path) -> int:
    cluster = _recorded(root)
    if cluster is None:
        print(f"no cluster in {root}")
        return 1
    states = cluster.node_states()
    for host, address in cluster.addresses.items():
        alive = [daemon.name for daemon in cluster.daemons.values() if daemon.host == host and daemon.pid()]
        print(f"{host:5} {address:15} {states.get(host, '-'):10} {' '.join(alive)}")
    return 1 if cluster.problems() else 0


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "down", "status"):
        commands.add_parser(name).add_argument(
            "--root", type=Path, default=ROOT, help=f"folder of the cluster ({ROOT})"
        )
    commands.choices["up"].add_argument("--nodes", type=int, default=4, help="number of nodes (4)")
    commands.choices["up"].add_argument(
        "--accounting", action="store_true", help="also start a database, so that sacct works"
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "status":
            return _status(arguments.root)
        if arguments.command == "down":
            down(arguments.root)
        else:
            settings = (arguments.nodes, arguments.accounting, arguments.root)
            if _is_up(_cluster(*settings)):
                print("already up with these settings")
            print(f"export SLURM_CONF={up(*settings).conf}")
    except (ClusterError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
