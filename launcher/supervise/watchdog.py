"""The watchdog process, one per node: ends its ranks, with a diagnosis, when a job hangs, and when the run was deleted.

It watches the heartbeats of the ranks. The node's first rank starts it, and it exits when its ranks have ended. It is a
separate process, so that it still works when the ranks are stuck in C, hold the GIL or are stopped. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.files import read_json, write_json
from launcher.run_folder.attempts import published_ranks
from launcher.supervise import hang_diagnosis, private_folder, process_inspection

if TYPE_CHECKING:  # the process itself does not need omegaconf, and should not spend time on importing it
    from conf.schema import Config
    from launcher.environment import RankInfo

POLL_S = 1.0
PUBLISH_S = 10.0
"""Time between two writes of this node's heartbeats for other nodes and `status`: each is a file on the shared file system."""
GATHER_S = 20.0
"""How long the node that notices a hang first waits for the other nodes' evidence.
jobs.distributed.process_group.MARGIN_S leaves time for it."""
GONE_S = 5.0
"""How long the attempt's folder must be missing until its ranks are ended."""
MARK = "hang.begun"
"""File in the attempt's folder that tells all nodes that one of them has noticed a hang."""


class Watchdog:
    """Watches the ranks of one node.

    `local` is the folder of their heartbeats on the node's own disk. `attempt` is the attempt's folder on the shared
    file system, where all nodes publish what they know.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.local, self.attempt, self.node = options.local, options.attempt, options.node
        self.local_world_size, self.world_size = options.here, options.world
        self.code: str | None = options.code
        self.limits_s = {"start": options.start, "train": options.step, "evaluate": options.step, "save": options.save}
        """Longest silence allowed by phase; all other phases use that of `start`."""
        self.heartbeats: dict[int, dict[str, Any]] = {}
        """Last heartbeat by rank, plus `silent_s`, the seconds since then, and `born`, the start time of the process."""
        self.last_poll, self.age_s, self.published = time.monotonic(), 0.0, -PUBLISH_S
        self.last_seen = time.monotonic()
        """When the attempt's folder was last there."""

    def run(self) -> None:
        """Watch until every rank of the node has ended, by itself or because this killed it."""
        while True:
            silent_s = self._read_heartbeats()
            if not any(
                heartbeat["phase"] != "ended" and process_inspection.is_alive(heartbeat)
                for heartbeat in self.heartbeats.values()
            ):
                for heartbeat in self.heartbeats.values():
                    heartbeat["phase"] = "ended"
                if self._folder_exists():
                    self._publish(answered=True)  # so that no other node waits for this one
                # A rank that never wrote a heartbeat ends with the first rank, which wrote one before it started this.
                break
            if self._folder_is_gone():
                self._kill_ranks()
                break
            due = time.monotonic() - self.published >= PUBLISH_S and self._folder_exists()
            if silent_s is not None or (due and (self.attempt / MARK).exists()):
                self._end_hang()
                break
            if due:
                self._publish()
            time.sleep(POLL_S)
        shutil.rmtree(self.local, ignore_errors=True)

    def _read_heartbeats(self) -> float | None:
        """Update `heartbeats`. Returns the longest silence in seconds if a rank has been silent too long, else None.

        A rank's silence is the sum of the times between two polls, each at most 2 * POLL_S. So a job that Slurm suspended,
        and this process with it, is not taken for a hang.
        """
        now = time.monotonic()
        passed, self.last_poll = min(now - self.last_poll, 2 * POLL_S), now
        self.age_s += passed
        files = [_read_heartbeat(path) for path in self.local.glob("rank-*.beat")]
        current = {heartbeat["rank"]: heartbeat for heartbeat in files if heartbeat}
        for rank, heartbeat in current.items():
            known = self.heartbeats.get(rank)
            if known and (known["count"], known["time"]) == (heartbeat["count"], heartbeat["time"]):
                known["silent_s"] += passed
            else:
                born = known["born"] if known else process_inspection.start_ticks(heartbeat["pid"])
                self.heartbeats[rank] = {**heartbeat, "silent_s": 0.0, "born": born}
        for rank, known in self.heartbeats.items():
            if rank not in current and not (self.local / f"rank-{rank}.beat").exists():
                known["phase"] = "ended"  # a rank deletes its file when it ends
        silences_s = [known["silent_s"] for known in self.heartbeats.values() if self._is_late(known)]
        if len(self.heartbeats) < self.local_world_size and self.age_s > self.limits_s["start"]:
            silences_s.append(self.age_s)  # a rank has never written a heartbeat
        return max(silences_s, default=None)

    def _is_late(self, known: dict[str, Any]) -> bool:
        limit_s = self.limits_s.get(known["phase"], self.limits_s["start"])
        return known["phase"] != "ended" and known["silent_s"] > limit_s and process_inspection.is_alive(known)

    def _publish(self, answered: bool = False) -> None:
        """Write this node's heartbeats for the other nodes and `status`. `answered`: the ranks have been inspected."""
        ranks = {str(rank): {**heartbeat, "answered": answered} for rank, heartbeat in sorted(self.heartbeats.items())}
        with suppress(OSError):  # a file system that does not answer may be the very cause of the hang
            write_json(self.attempt / f"node-{self.node}.json", {"ranks": ranks})
        self.published = time.monotonic()

    def _end_hang(self) -> None:
        """Inspect this node's ranks, wait until the other nodes have done so, write the verdict, and kill the ranks.

        The node that noticed first writes the verdict. If that node is lost, another one does, later.
        """
        patience_s = GATHER_S if self._is_first() else 2 * GATHER_S
        process_inspection.inspect_ranks(self.heartbeats, self.local, self.attempt)
        self._publish(answered=True)
        verdict_path, deadline = self.attempt / "hang.json", time.monotonic() + patience_s
        while not verdict_path.exists():
            own = {rank: {**heartbeat, "answered": True} for rank, heartbeat in self.heartbeats.items()}
            evidence = published_ranks(self.attempt) | own
            if sum(item["answered"] for item in evidence.values()) < self.world_size and time.monotonic() < deadline:
                time.sleep(POLL_S / 2)
                continue
            code = str(Path(__file__).resolve().parent.parent.parent)
            with suppress(OSError):
                verdict = hang_diagnosis.diagnose(evidence, self.world_size, self.code or code)
                write_json(verdict_path, verdict | {"time": time.time()})
            break
        self._kill_ranks()

    def _kill_ranks(self) -> None:
        for heartbeat in self.heartbeats.values():
            if heartbeat["phase"] != "ended":
                process_inspection.send_signal(heartbeat, signal.SIGKILL)

    def _folder_is_gone(self) -> bool:
        """Return whether somebody has deleted the run: its ranks would compute for days what they can save nowhere."""
        if self._folder_exists():
            self.last_seen = time.monotonic()
        return time.monotonic() - self.last_seen > GONE_S

    def _folder_exists(self) -> bool:
        try:
            self.attempt.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a file system that does not answer is another matter
            return True
        return True

    def _is_first(self) -> bool:
        """Return whether this node is the first to notice the hang, and mark the hang for all nodes."""
        try:
            (self.attempt / MARK).open("x").close()
        except OSError:
            return False
        return True


def _read_heartbeat(path: Path) -> dict[str, Any] | None:
    """Read a rank's heartbeat; None if there is none, or if the rank is just writing it."""
    with suppress(OSError, ValueError):
        heartbeat = read_json(path)
        return heartbeat if isinstance(heartbeat, dict) else None
    return None


def heartbeat_folder(scratch: str, attempt: Path, node: int) -> Path:
    """Return the folder for the heartbeats of a node's ranks: on the node's own disk, with a name that no other job has.

    It is in this user's private folder, which this makes. Raises SiteError or OSError if there can be none.
    """
    name = hashlib.sha256(str(attempt).encode()).hexdigest()[:16]
    return private_folder.make(scratch, os.getuid()) / f"watch-{name}-{node}"


def start(config: Config, attempt: Path, rank_info: RankInfo) -> None:
    """Start the watchdog of this node in its own session, so that a signal that stops this rank does not stop it."""
    network = config.cluster.network
    words: list[object] = [sys.executable, "-m", "launcher.supervise.watchdog"]
    words += [heartbeat_folder(config.cluster.scratch, attempt, rank_info.node_rank), attempt]
    words += ["--node", rank_info.node_rank, "--here", rank_info.local_world_size, "--world", rank_info.world_size]
    words += ["--start", network.nccl_timeout_s, "--step", network.step_timeout_s, "--save", network.save_timeout_s]
    if config.custom.command is not None and config.custom.folder:
        words += ["--code", config.custom.folder]
    # srun waits until the rank's stdout and stderr are closed, so the watchdog must not inherit them.
    dev_null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    os.posix_spawn(sys.executable, [str(word) for word in words], os.environ, file_actions=dev_null, setsid=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the watchdog. Writes the traceback to watchdog-NODE.log if it fails: nobody reads its stderr."""
    parser = argparse.ArgumentParser(prog="python -m launcher.supervise.watchdog", description=__doc__)
    parser.add_argument("local", type=Path, help="folder of the heartbeats on this node")
    parser.add_argument("attempt", type=Path, help="folder of the attempt in the run")
    parser.add_argument("--node", type=int, required=True, help="number of this node")
    parser.add_argument("--here", type=int, required=True, help="ranks on this node")
    parser.add_argument("--code", help="folder of the program that trains, if it is not Muster")
    parser.add_argument("--world", type=int, required=True, help="ranks of the job")
    for name in ("start", "step", "save"):
        parser.add_argument(f"--{name}", type=float, required=True, help="longest silence in this phase, in seconds")
    options = parser.parse_args(arguments)
    # Slurm may send signals to every process of a job step. The ranks decide when the step ends.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        Watchdog(options).run()
    except Exception:
        (options.attempt / f"watchdog-{options.node}.log").write_text(traceback.format_exc(), encoding="utf-8")
        raise


if __name__ == "__main__":
    main()
