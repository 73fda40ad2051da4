"""Starts Ray on one node of a job, runs the user's program on the first node, and ends Ray. Standard library only.

The job `custom` runs it on each node, with the program's own Python: `python -m muster.ray_node --node 0 ... -- train.py`.
"""

from __future__ import annotations  # the program's own Python may be 3.9

import argparse
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from muster.ray_lines import Marks

POLL_S = 0.2
END_S = 15.0
"""Seconds in which Ray ends on a node, before its processes are killed."""
PR_SET_PDEATHSIG = 1
WAIT_FOR_NODES = """
import ray, sys, time
ray.init(log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.2)
"""


class Node:
    """Ray on this node. `shared` is a folder of this start that all nodes see."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shared: Path = options.shared
        self.log: Path = self.shared / f"node-{options.node}.log"
        self.address = own_address(options.address, options.port)

    def start(self) -> subprocess.Popen[bytes]:
        """Start Ray's processes of this node as children of one process."""
        options = self.options
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        words += [f"--node-ip-address={self.address}", f"--num-cpus={options.cpus}", f"--num-gpus={options.gpus}"]
        # The kernel chooses all other ports. Ray's own choices are the same for two jobs on a node
        words += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        words += [f"--temp-dir={options.local}/ray"]
        if options.node == 0:
            words += ["--head", f"--port={options.port}", "--include-dashboard=false"]
            words += [f"--ray-client-server-port={free_port()}"]
        else:
            words += [f"--address={self._head()}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, preexec_fn=ends_with_this())

    def _head(self) -> str:
        """Wait for the first node, and return its address."""
        while not (self.shared / "head").exists():
            if (self.shared / "end").exists():
                raise SystemExit(0)
            time.sleep(POLL_S)
        return (self.shared / "head").read_text(encoding="utf-8")

    def check(self, node: subprocess.Popen[bytes]) -> None:
        """Raise RuntimeError if Ray has ended by itself."""
        if node.poll() is not None and not (self.shared / "end").exists():
            raise RuntimeError(
                f"Ray on {socket.gethostname()} has ended with exit code {node.returncode}; see {self.log}"
            )

    def run_program(self, node: subprocess.Popen[bytes]) -> int:
        """Start the program when all nodes have joined, and pass its output on. Returns its exit status."""
        head = f"{self.address}:{self.options.port}"
        while not answers(self.address, self.options.port):
            self.check(node)
            time.sleep(POLL_S)
        publish(self.shared / "head", head)
        os.environ["RAY_ADDRESS"] = head  # for the program
        waits = subprocess.Popen([sys.executable, "-c", WAIT_FOR_NODES, str(self.options.nodes)])
        while waits.poll() is None:
            self.check(node)
            time.sleep(POLL_S)
        if waits.returncode:
            raise RuntimeError(f"cannot connect to Ray at {head}; see {self.log}")
        print(f"Ray runs on {self.options.nodes} nodes, RAY_ADDRESS={head}", flush=True)
        words = [sys.executable, *self.options.program]
        program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=ends_with_this())
        marks = Marks(self.options.mark, self.address)
        for line in program.stdout or ():
            sys.stdout.buffer.writelines(marks.lines(line))
            sys.stdout.buffer.flush()
        sys.stdout.buffer.writelines(marks.rest())
        return program.wait()

    def wait_for_end(self, node: subprocess.Popen[bytes]) -> int:
        """Serve the program of the first node until it has ended. Returns the exit status."""
        (self.shared / f"joined-{self.options.node}").touch()
        print(f"Ray of this node writes to {self.log}. The program runs on the first node", flush=True)
        while not (self.shared / "end").exists():
            self.check(node)
            time.sleep(POLL_S)
        return 0

    def end(self, node: subprocess.Popen[bytes]) -> None:
        """End Ray on this node. The first node waits for the others: their processes lose their head."""
        if self.options.node == 0:
            (self.shared / "end").touch()
            deadline = time.monotonic() + END_S
            while list(self.shared.glob("joined-*")) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        node.terminate()
        with suppress(subprocess.TimeoutExpired):  # what is left is killed by the task that started this
            node.wait(END_S)
        with suppress(OSError):
            (self.shared / ("token" if self.options.node == 0 else f"joined-{self.options.node}")).unlink()


def ends_with_this() -> Callable[[], object]:
    """Return what a new process calls so that it ends when this one is killed."""
    prctl = ctypes.CDLL(None).prctl  # before the fork: there is no safe way to load it after
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def own_address(address: str, port: int) -> str:
    """Return this node's own IPv4 address on the way to the first node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def answers(address: str, port: int) -> bool:
    """Return whether something listens at an address."""
    with suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def publish(path: Path, text: str) -> None:
    """Write a small file that other nodes wait for: it is there with its text or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def main() -> int:
    """Start Ray on this node, and end it with the program. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m muster.ray_node", description=__doc__)
    for name in ("node", "nodes", "port", "cpus", "gpus"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", required=True, help="the first node, as the others reach it")
    parser.add_argument("--shared", type=Path, required=True, help="folder of this start that all nodes see")
    parser.add_argument("--local", type=Path, required=True, help="folder on the node's own disk")
    parser.add_argument("--mark", required=True, help="what comes before the rank in a line of a worker")
    parser.add_argument("program", nargs="+", help="the script or -m MODULE, and its arguments")
    options = parser.parse_args()
    if find_spec("ray") is None:
        missing = f"No module named 'ray': custom.launcher=ray needs it in {sys.executable}: pip install 'ray[train]'"
        raise ModuleNotFoundError(missing)
    options.shared.mkdir(parents=True, exist_ok=True)
    if options.node == 0:
        token = options.shared / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
    node = Node(options)
    ray = node.start()
    try:
        return node.run_program(ray) if options.node == 0 else node.wait_for_end(ray)
    finally:
        node.end(ray)


if __name__ == "__main__":
    sys.exit(main())
