"""Start and stop a real Slurm of several nodes on one machine: `python tests/slurm/cluster.py up|down|status`.

Each node is a network namespace with its own host name, `eth0` and address, sharing the machine's file system; the
controller (with munge, and with the database if wanted) is one more. The root namespace is the login node. Needs root,
Debian's packages (`available` names them) and no systemd. There is at most one cluster on a machine.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and not __package__:  # PEP 366: a script that imports from its package
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "slurm"

from . import config, machine

ROOT = Path("/tmp/muster-slurm")
NETWORK = "198.18.77"  # from the range kept for benchmarks: no machine has it, no router carries it
LOGIN_ADDRESS = f"{NETWORK}.254"
MAX_NODES = 200


class ClusterError(Exception):
    """The cluster could not be started or changed; the text ends with the logs of the daemons at fault."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs, or is about to, with its files in `root`. Made by `up` or `running`."""

    root: Path
    nodes: list[str]
    accounting: bool

    @property
    def conf(self) -> Path:
        """What SLURM_CONF must be to use this cluster."""
        return self.root / "slurm.conf"

    @property
    def addresses(self) -> dict[str, str]:
        """Host name -> IPv4 address, of the nodes and of the controller."""
        nodes = {node: f"{NETWORK}.{number}" for number, node in enumerate(self.nodes, start=1)}
        return nodes | {config.CONTROLLER: f"{NETWORK}.253"}

    @property
    def daemons(self) -> dict[str, str]:
        """Daemon name -> the host it runs on, in starting order. Its files are run/NAME.pid and log/NAME.log."""
        names = ["munged", *(["mariadbd", "slurmdbd"] if self.accounting else []), "slurmctld"]
        return dict.fromkeys(names, config.CONTROLLER) | {f"slurmd-{node}": node for node in self.nodes}

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Run a Slurm command on the login node and return what it printed. Raises CalledProcessError."""
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout_s).stdout

    def node_states(self) -> dict[str, str]:
        """Node -> state as sinfo says it (`idle`, `mixed`, `down*`, ...); empty while no controller answers."""
        if self.pid("slurmctld") is None:  # sinfo would try again for a minute
            return {}
        with suppress(subprocess.SubprocessError):
            lines = self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T").splitlines()
            return dict(line.split() for line in lines)
        return {}

    def pid(self, daemon: str) -> int | None:
        """The process id of a live daemon; None for one that is not running (a stale pid file counts for nothing)."""
        with suppress(OSError, ValueError):
            pid = int((self.root / "run" / f"{daemon}.pid").read_text())
            return pid if machine.is_on(pid, [self.daemons[daemon]]) else None
        return None

    def problems(self) -> list[str]:
        """Daemons that are not running and nodes that cannot take a job; empty when all is well."""
        states = self.node_states()
        dead = [daemon for daemon in self.daemons if self.pid(daemon) is None]
        usable = re.compile(r"(idle|mixed|allocated|completing|reserved)\+?$")
        return dead + [f"slurmd-{node}" for node in self.nodes if not usable.match(states.get(node, "unknown"))]

    # What the tests of failures do.

    def unplug(self, node: str) -> None:
        """Pull the node's network cable. Its processes live on. Slurm calls it down after SlurmdTimeout, 30 s."""
        machine.set_cable(node, plugged=False)

    def plug(self, node: str) -> None:
        """Put the cable back."""
        machine.set_cable(node, plugged=True)

    def kill_slurmd(self, node: str) -> None:
        """Kill -9 the node's slurmd alone: job steps live on."""
        self._stop(f"slurmd-{node}", signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        """Start the node's slurmd, for one that was killed."""
        self._launch(f"slurmd-{node}", "slurmd", "-D", "-f", self.conf, "-N", node)
        self._wait([f"slurmd-{node}"], lambda: self.pid(f"slurmd-{node}") is not None)

    def crash(self, node: str) -> None:
        """Cut the node's power: kill -9 all that runs on it. `start_slurmd` boots it again."""
        machine.kill([node])

    def stop_controller(self) -> None:
        """Stop slurmctld in good order. Jobs run on."""
        self._stop("slurmctld", signal.SIGTERM)

    def start_controller(self) -> None:
        """Start slurmctld from its saved state and wait until it answers."""
        self._launch("slurmctld", "slurmctld", "-D", "-f", self.conf)
        self._wait(["slurmctld"], lambda: bool(self.node_states()))

    def restart_controller(self) -> None:
        """Stop and start slurmctld. Jobs run on and are found again."""
        self.stop_controller()
        self.start_controller()

    def down(self) -> None:
        """Stop everything and leave nothing behind."""
        down(self.root)

    # Starting.

    def _files(self) -> dict[str, str]:
        return config.files(root=self.root, addresses=self.addresses, accounting=self.accounting)

    def _is_up(self) -> bool:
        """Is this very cluster, with these settings, running and well?"""
        with suppress(OSError):
            same = all((self.root / name).read_text() == text for name, text in self._files().items())
            return same and not self.problems()
        return False

    def _start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / ".muster").touch()
        machine.borrow(
            self.addresses, login_address=LOGIN_ADDRESS, gpus=config.GPUS_PER_NODE, root=self.root
        )
        self._write_files()
        self._start_munge()
        if self.accounting:
            self._start_database()
        self._launch("slurmctld", "slurmctld", "-D", "-f", self.conf)
        for node in self.nodes:
            self._launch(f"slurmd-{node}", "slurmd", "-D", "-f", self.conf, "-N", node)
        self._wait(self.problems, lambda: set(self.node_states().values()) == {"idle"} and not self.problems())

    def _write_files(self) -> None:
        for folder in ("state", "log", "run", *(f"spool/{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        for name, text in self._files().items():
            (self.root / name).write_text(text)
            (self.root / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)  # else slurmdbd refuses to start

    def _start_munge(self) -> None:
        key, run = self.root / "munge.key", self.root / "run"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        options = {"key-file": key, "socket": run / "munge.socket", "pid-file": run / "munged.pid"}
        options |= {"seed-file": run / "munged.seed"}
        self._launch("munged", "munged", "--foreground", *(f"--{name}={value}" for name, value in options.items()))
        self._wait(["munged"], (run / "munge.socket").exists)

    def _start_database(self) -> None:
        """Start a private MariaDB without network or fsync, and slurmdbd in front of it."""
        data, socket = self.root / "database", self.root / "run" / "mariadb.socket"
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db"]
        install += ["--auth-root-authentication-method=normal"]
        result = subprocess.run(install, env={"PATH": machine.PATH}, capture_output=True, text=True)
        if result.returncode != 0:
            raise ClusterError(f"mariadb-install-db failed:\n{result.stdout}\n{result.stderr}")
        options = ["--no-defaults", f"--datadir={data}", f"--socket={socket}", "--user=root", "--skip-networking"]
        options += [f"--pid-file={self.root}/run/mariadbd.pid", "--innodb-flush-method=nosync"]
        self._launch("mariadbd", "mariadbd", *options)
        self._wait(["mariadbd"], socket.exists)
        self._launch("slurmdbd", "slurmdbd", "-D")
        self._wait(["slurmdbd"], lambda: self.pid("slurmdbd") is not None)

    def _launch(self, daemon: str, *command: str | Path) -> None:
        """Run a foreground daemon detached from this process, its output in log/DAEMON.log.

        Its environment is made here, so that nothing of the caller's reaches the jobs through it.
        """
        env = {"PATH": machine.PATH, "SLURM_CONF": str(self.conf)}
        env |= {"MYSQL_UNIX_PORT": str(self.root / "run" / "mariadb.socket")}
        with (self.root / "log" / f"{daemon}.log").open("ab") as log:
            wrapped = machine.inside(self.daemons[daemon], ["setsid", "--fork", *command])
            subprocess.run(wrapped, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, cwd=self.root)

    def _stop(self, daemon: str, number: signal.Signals) -> None:
        pid = self.pid(daemon)
        if pid is None:
            raise ClusterError(f"{daemon} is not running")
        os.kill(pid, number)
        self._wait([daemon], lambda: not machine.is_on(pid, [self.daemons[daemon]]))

    def _wait(self, suspects: list[str] | Callable[[], list[str]], ready: Callable[[], bool], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline:
                names = suspects() if callable(suspects) else suspects
                tails = [f"--- end of {daemon}.log\n{self._tail(daemon)}" for daemon in dict.fromkeys(names)]
                raise ClusterError("\n".join([f"not ready after {timeout_s:g} s: {', '.join(names)}", *tails]))
            time.sleep(0.05)

    def _tail(self, daemon: str, lines: int = 15) -> str:
        path = self.root / "log" / f"{daemon}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def available(accounting: bool = False) -> str | None:
    """Say in one sentence why no real Slurm can be started here; None where one can."""
    return machine.missing(accounting)


def running(root: Path = ROOT) -> Cluster | None:
    """The cluster that is up and well in `root`, if there is one."""
    cluster = _recorded(root)
    return cluster if cluster and not cluster.problems() else None


def up(nodes: int = 4, accounting: bool = False, root: Path = ROOT) -> Cluster:
    """Start a cluster and wait until all nodes are idle (about 5 s; 10 s with accounting, which sacct needs).

    One that runs with the same settings is returned as it is; any other is taken down first.
    Raises ClusterError, and leaves nothing behind, where it cannot start.
    """
    if reason := available(accounting):
        raise ClusterError(reason)
    if not 1 <= nodes <= MAX_NODES:
        raise ClusterError(f"nodes={nodes}: ask for 1 to {MAX_NODES}")
    cluster = Cluster(root.absolute(), [f"n{number}" for number in range(1, nodes + 1)], accounting)
    with machine.lock():
        if cluster._is_up():
            return cluster
        _take_down(cluster.root)
        try:
            cluster._start()
        except BaseException:
            _take_down(cluster.root)
            raise
    return cluster


def down(root: Path = ROOT) -> None:
    """Leave nothing behind of the machine's cluster, whether it is up, half up or gone."""
    with machine.lock():
        _take_down(root.absolute())


def _recorded(root: Path) -> Cluster | None:
    """The cluster that the files in `root` describe."""
    with suppress(OSError):
        nodes = re.findall(r"^NodeName=(\S+)", (root / "slurm.conf").read_text(), re.MULTILINE)
        return Cluster(root.absolute(), nodes, (root / "slurmdbd.conf").exists())
    return None


def _take_down(root: Path) -> None:
    roots = {root, *machine.roots()}
    for folder in roots:
        if folder.exists() and any(folder.iterdir()) and not (folder / ".muster").exists():
            raise ClusterError(f"root={folder}: there are files in it which are not a cluster's; name another folder")
    machine.release()
    for folder in roots:
        shutil.rmtree(folder, ignore_errors=True)


def _status(root: Path) -> int:
    cluster = _recorded(root)
    if cluster is None:
        print(f"no cluster in {root}")
        return 1
    states = cluster.node_states()
    for node, address in cluster.addresses.items():
        alive = [daemon for daemon, host in cluster.daemons.items() if host == node and cluster.pid(daemon)]
        print(f"{node:5} {address:15} {states.get(node, '-'):10} {' '.join(alive)}")
    return 1 if cluster.problems() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "down", "status"):
        commands.add_parser(name).add_argument("--root", type=Path, default=ROOT, help="folder of the cluster")
    commands.choices["up"].add_argument("--nodes", type=int, default=4)
    commands.choices["up"].add_argument("--accounting", action="store_true", help="also a database, for sacct")
    arguments = parser.parse_args()
    if arguments.command == "status":
        return _status(arguments.root)
    try:
        if arguments.command == "down":
            down(arguments.root)
        else:
            print(f"export SLURM_CONF={up(arguments.nodes, arguments.accounting, arguments.root).conf}")
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
