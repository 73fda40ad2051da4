"""The daemons of the test cluster: their command lines; starting, stopping and reading the log of each."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import config, machine


class ClusterError(Exception):
    """The cluster could not be started or used. The text ends with the logs of the daemons at fault."""


@dataclass(frozen=True)
class Daemon:
    """A daemon on one host. ROOT/run/NAME.pid has its process id, ROOT/log/NAME.log its output."""

    name: str
    host: str
    command: Sequence[str]
    root: Path

    def pid(self) -> int | None:
        """The process id. None if it does not run, even if a stale pid file exists."""
        with suppress(OSError, ValueError):
            pid = int((self.root / "run" / f"{self.name}.pid").read_text())
            return pid if machine.is_on(pid, [self.host]) else None
        return None

    def start(self) -> None:
        """Start it detached from this process. It may not be ready when this returns: see `wait`.

        It gets a minimal environment, so that no variable of the caller reaches the jobs.
        """
        env = {"PATH": machine.PATH, "SLURM_CONF": f"{self.root}/slurm.conf"}
        env["MYSQL_UNIX_PORT"] = f"{self.root}/run/mariadb.socket"  # slurmdbd has no option for the socket
        command = machine.inside(self.host, ["setsid", "--fork", *self.command])
        with (self.root / "log" / f"{self.name}.log").open("ab") as log:
            subprocess.run(command, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)

    def stop(self, number: signal.Signals) -> None:
        """Send it a signal and wait until it has ended. Processes that it started continue."""
        pid = self.pid()
        if pid is None:
            raise ClusterError(f"{self.name} is not running")
        os.kill(pid, number)
        wait(lambda: not machine.is_on(pid, [self.host]), lambda: [self])

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        with suppress(OSError):
            text = (self.root / "log" / f"{self.name}.log").read_text(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return "(no log)"


def wait(ready: Callable[[], bool], suspects: Callable[[], Iterable[Daemon]], timeout_s: float = 20) -> None:
    """Return as soon as `ready()` is true. After `timeout_s`, raises ClusterError with the logs of the `suspects()`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            tails = [f"--- {daemon.name} (end of its log)\n{daemon.tail()}" for daemon in suspects()]
            raise ClusterError("\n".join([f"The cluster is not ready after {timeout_s:g} s.", *tails]))
        time.sleep(0.05)


def daemons(*, root: Path, nodes: Sequence[str], accounting: bool) -> dict[str, Daemon]:
    """Every daemon by name, in the order in which they must start."""
    run = root / "run"
    commands = {
        "munged": [
            "munged", "--foreground", f"--key-file={root}/munge.key", f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed",
        ]
    }  # fmt: skip
    if accounting:
        # nosync: the database dies with the cluster, so nothing in it needs to reach the disk.
        commands["mariadbd"] = [
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={root}/database", "--skip-networking",
            f"--socket={run}/mariadb.socket", f"--pid-file={run}/mariadbd.pid", "--innodb-flush-method=nosync",
        ]  # fmt: skip
        commands["slurmdbd"] = ["slurmdbd", "-D"]
    commands["slurmctld"] = ["slurmctld", "-D", "-f", f"{root}/slurm.conf"]
    by_name = {name: Daemon(name, config.CONTROLLER, command, root) for name, command in commands.items()}
    for node in nodes:
        name, command = f"slurmd-{node}", ["slurmd", "-D", "-f", f"{root}/slurm.conf", "-N", node]
        by_name[name] = Daemon(name, node, command, root)
    return by_name


def install_database(root: Path) -> None:
    """Make the empty database for mariadbd (1 s). It runs on the controller's host, so that `release` also ends it."""
    command = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={root}/database", "--skip-test-db"]
    command.append("--auth-root-authentication-method=normal")
    wrapped = machine.inside(config.CONTROLLER, command)
    result = subprocess.run(wrapped, env={"PATH": machine.PATH}, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ClusterError(f"mariadb-install-db: exit {result.returncode}\n{result.stdout}{result.stderr}")
