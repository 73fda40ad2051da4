"""Runs the user's program as a child of this task: passes on requests to stop, watches its progress, and says how it ended."""

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from conf import node_paths
from conf.choices import Precision, ProgramLauncher
from conf.errors import ConfigError, Problem, Stopped
from conf.files import write_json, write_text
from conf.schema import Config
from jobs.distributed import heartbeat
from jobs.distributed.stop_signals import Request, StopFlag
from jobs.programs import command, failure, hang_stacks, nvidia_driver, precision, processes
from jobs.programs.output import Output
from jobs.programs.variables import program_variables

log = logging.getLogger(__name__)

POLL_S = 0.5
STOP_SHARE = 0.8
"""Share of `cluster.signal_s` that the program may use to save and end. The rest is for the verdict."""
STACKS_S = 2.0
"""Seconds that the ranks get to write their Python stacks. The watchdog waits for 6 s."""
KILLED_S = 120.0
"""Seconds within which the watchdogs of all nodes kill the tasks of a job that hangs."""
PDEATHSIG = 1
"""prctl's request for a signal when the parent ends."""


class Supervisor:
    """The program of one task, and what was asked of it. `stop` is this task's flag."""

    def __init__(self, config: Config, stop: StopFlag) -> None:
        run, number = Path(config.run_dir), os.environ.get("MUSTER_ATTEMPT", "1")
        self.config, self.stop = config, stop
        self.attempt = run / "jobs" / "custom" / f"attempt-{number}"
        self.task, self.tasks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        scratch = node_paths.expanded(config.cluster.scratch, "cluster.scratch")
        self.local = Path(tempfile.mkdtemp(prefix="muster-", dir=scratch))
        self.stop_file = self.attempt / "stop"
        self.request: Request | None = None
        self.kill_at = float("inf")
        self.killed = self.hangs = False

    @property
    def first_rank(self) -> int:
        """The rank whose log gets the lines that no rank has marked."""
        starts_one = self.config.custom.launcher is ProgramLauncher.srun
        return self.task if starts_one else self.task * self.config.cluster.train.ranks_per_node

    @property
    def only_serves(self) -> bool:
        """Whether this task has no program of its own: Ray's workers on it write to the program of the first node."""
        return self.config.custom.launcher is ProgramLauncher.ray and self.task > 0

    def run(self) -> None:
        """Run the program to its end. Raises Stopped if it ended after a request to stop, ProgramFailed if it failed."""
        (self.local / "beats").mkdir(parents=True, exist_ok=True)
        self.attempt.mkdir(parents=True, exist_ok=True)
        (Path(self.config.run_dir) / "checkpoints").mkdir(exist_ok=True)
        others = processes.descendants(os.getpid())  # this process, and the watchdog that it has started
        processes.adopt_orphans()
        program, output = self._start()
        heartbeat.answer_stacks_with(partial(self._stacks, program.pid, output))
        seen = (0, 0)
        try:
            while program.poll() is None:
                seen = self._report_progress(output, seen)
                self._pass_on_stop(program.pid)
                time.sleep(POLL_S)
        finally:
            processes.end(os.getpid(), others)
            output.finish()
        if self.hangs:
            shutil.rmtree(self.local, ignore_errors=True)
            time.sleep(KILLED_S)  # the watchdog has found a hang, and its verdict counts
        self._judge(program.returncode, output)

    def _stacks(self, pid: int, output: Output) -> str:
        """End the ranks of a program that hangs with their Python stacks, as text. The watchdog kills this task afterwards."""
        self.hangs = True
        if self.config.custom.launcher is ProgramLauncher.ray:
            processes.tell(pid, signal.SIGQUIT)
            time.sleep(STACKS_S)
            processes.end(pid)
            return hang_stacks.text(hang_stacks.of_workers(self.local / "beats"))
        processes.abort_ranks(pid)
        time.sleep(STACKS_S)
        return hang_stacks.text(output.last)

    def _start(self) -> tuple["subprocess.Popen[bytes]", Output]:
        variables = program_variables(self.config, os.environ, self.attempt, self.local)
        if self.config.cluster.train.gpus_per_node:
            self._fit_to_gpus(variables)
        if self.config.custom.launcher is ProgramLauncher.accelerate:
            write_json(self.local / command.ACCELERATE_FILE, command.accelerate_settings(variables))
        place = command.Place(self.task, self.tasks, variables["MASTER_ADDR"], variables["MASTER_PORT"])
        words = command.words(self.config, place, sys.executable, variables)
        folder = str(self.config.custom.folder)
        # as it was written: the value of a variable may be a secret
        log.info(f"starts in {folder} by {self.config.custom.launcher.name}: {self.config.custom.command}")
        libc = ctypes.CDLL(None)  # before the fork: there is no safe way to load it after

        def prepare() -> None:
            libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm may send them to every process of a step
                signal.signal(number, signal.SIG_IGN)

        try:
            program = subprocess.Popen(
                words, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=prepare
            )
        except OSError as error:
            message = (
                f"cannot be started in {folder} on this node ({error.strerror}: {error.filename}). Check custom.folder and "
                "the command's first word"
            )
            raise ConfigError(Problem("custom.command", self.config.custom.command, message)) from None
        assert program.stdout is not None
        return program, Output(program.stdout, self.attempt, self.first_rank)

    def _fit_to_gpus(self, variables: dict[str, str]) -> None:
        if "NCCL_P2P_DISABLE" not in variables and not nvidia_driver.all_peers():
            variables["NCCL_P2P_DISABLE"] = "1"  # consumer cards hang in NCCL's first collective
            log.info("the GPUs of this node have no peer access: set NCCL_P2P_DISABLE=1")
        if self.config.train.precision is Precision.auto:
            variables["ACCELERATE_MIXED_PRECISION"] = precision.settle(self.config, self.task).name

    def _report_progress(self, output: Output, seen: tuple[int, int]) -> tuple[int, int]:
        """Write a heartbeat if the program has called `muster.beat` or written a line since the last look."""
        newest_ns, beat = newest_beat(self.local / "beats")
        now = (output.lines, newest_ns)
        if newest_ns != seen[1]:
            phase, _, step = beat.partition(" ")
            heartbeat.beat(phase or "train", int(step) if step else None)
        elif now != seen or self.only_serves:
            heartbeat.refresh()
        return now

    def _pass_on_stop(self, pid: int) -> None:
        """Tell the program once that it should save and end; kill it if it does not."""
        if self.request is None:
            if self.stop.requested():
                self.request = self.stop.request
            elif self.stop_file.exists():  # another task was asked
                status, _, reason = self.stop_file.read_text(encoding="utf-8", errors="replace").partition(" ")
                self.request = (status or "stopped", reason.strip() or "asked to stop by a file")
            if self.request is not None:
                if not self.stop_file.exists():
                    write_text(self.stop_file, " ".join(self.request))
                log.info(f"{self.request[1]}: the program is told by {self.stop_file} and SIGUSR1")
                processes.tell(pid, signal.SIGUSR1)
                self.kill_at = time.monotonic() + STOP_SHARE * self.config.cluster.signal_s
        elif time.monotonic() > self.kill_at:
            log.warning("the program did not end in time, and is killed")
            self.killed = True
            processes.end(pid)

    def _wait_for_other_tasks(self) -> None:
        """Wait until all tasks have ended: srun kills the others as soon as one exits, and they may still be saving."""
        (self.attempt / f"ended-{self.task}").touch()
        while time.monotonic() < self.kill_at + POLL_S and len(list(self.attempt.glob("ended-*"))) < self.tasks:
            time.sleep(POLL_S)

    def _judge(self, code: int, output: Output) -> None:
        if self.request is not None:
            status, reason = self.request
            killed = self.killed
            how = (
                f"did not end within {STOP_SHARE * self.config.cluster.signal_s:.0f} s and was killed"
                if killed
                else _ending(code)
            )
            self._wait_for_other_tasks()
            raise Stopped(status, f"{reason}; the program {how}")
        if code != 0:
            raise failure.find(output.last, _ending(code), self.first_rank)


def newest_beat(folder: Path) -> tuple[int, str]:
    """Return when the newest beat of the ranks was written, in ns, and its text; (0, "") before the first.

    The ranks replace these files all the time, so any of them may be gone when it is read.
    """
    newest = (0, "")
    for path in folder.glob("*"):
        if path.name.isdigit():
            with suppress(OSError):
                newest = max(newest, (path.stat().st_mtime_ns, path.read_text(encoding="utf-8")))
    return newest


def _ending(code: int) -> str:
    """How a program ended, from its exit code as `subprocess` gives it."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
