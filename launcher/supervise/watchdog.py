"""One process a node that watches its ranks' heartbeats, and ends a job that hangs once it knows, and has said, who is behind.

Started by the node's first rank, and gone when its ranks are. It lives outside them, so that it still works when they are
stuck in C, hold the interpreter or are stopped. Standard library only.
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
from launcher.run_folder.attempts import gathered
from launcher.supervise import hang_diagnosis, process_inspection

if TYPE_CHECKING:  # the process itself needs neither omegaconf nor the time to import it
    from conf.schema import Config
    from launcher.environment import Ranks

POLL_S = 1.0
PUBLISH_S = 10.0
"""Between looks of other nodes and of `status` at this one: each is a file on the shared file system."""
GATHER_S = 20.0
"""How long the first node to notice waits for what the others have seen; jobs.distributed.process_group.MARGIN_S
leaves time for it."""
MARK = "hang.begun"


class Watchdog:
    """Of the ranks on one node: `local` has their heartbeats, `attempt` is where all nodes write what they know."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.local, self.attempt, self.node = options.local, options.attempt, options.node
        self.here, self.world = options.here, options.world
        step_s = options.step
        self.limits = {"start": options.start, "train": step_s, "evaluate": step_s, "save": options.save}
        self.beats: dict[int, dict[str, Any]] = {}
        """Last heartbeat by rank, with `silent_s` since then and `born`, when its process started."""
        self.looked, self.age_s, self.published = time.monotonic(), 0.0, -PUBLISH_S

    def run(self) -> None:
        """Until every rank of the node is gone, whether by itself or by this."""
        while True:
            silent_s = self._look()
            if not any(item["phase"] != "ended" and process_inspection.is_there(item) for item in self.beats.values()):
                for item in self.beats.values():
                    item["phase"] = "ended"
                self._publish(answered=True)  # nobody need wait for word from here
                break  # a rank that never marked anything goes with the first, which did before it started this
            due = time.monotonic() - self.published >= PUBLISH_S
            if silent_s is not None or (due and (self.attempt / MARK).exists()):
                self._end_hang()
                break
            if due:
                self._publish()
            time.sleep(POLL_S)
        shutil.rmtree(self.local, ignore_errors=True)

    def _look(self) -> float | None:
        """Read the heartbeats; the longest silence, in seconds, where a rank has been silent for too long, else None.

        Time is counted by looks, so that a job that was suspended, and this process with it, is not taken for a hang.
        """
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 2 * POLL_S), now
        self.age_s += passed
        found = {item["rank"]: item for path in self.local.glob("rank-*.beat") if (item := _beat(path))}
        for rank, item in found.items():
            known = self.beats.get(rank)
            if known and (known["count"], known["time"]) == (item["count"], item["time"]):
                known["silent_s"] += passed
            else:
                self.beats[rank] = {
                    **item,
                    "silent_s": 0.0,
                    "born": known["born"] if known else process_inspection.born(item["pid"]),
                }
        for rank, known in self.beats.items():
            if rank not in found and not (self.local / f"rank-{rank}.beat").exists():
                known["phase"] = "ended"
        late = [known["silent_s"] for known in self.beats.values() if self._is_late(known)]
        if len(self.beats) < self.here and self.age_s > self.limits["start"]:
            late.append(self.age_s)
        return max(late, default=None)

    def _is_late(self, known: dict[str, Any]) -> bool:
        limit_s = self.limits.get(known["phase"], self.limits["start"])
        return known["phase"] != "ended" and known["silent_s"] > limit_s and process_inspection.is_there(known)

    def _publish(self, answered: bool = False) -> None:
        """For other nodes and `status`: what is known of this node's ranks; `answered` once they were asked for their stacks."""
        ranks = {str(rank): {**item, "answered": answered} for rank, item in sorted(self.beats.items())}
        with suppress(OSError):  # a file system that does not answer may be what is wrong
            write_json(self.attempt / f"node-{self.node}.json", {"ranks": ranks})
        self.published = time.monotonic()

    def _end_hang(self) -> None:
        """Look at this node's ranks, wait for the other nodes to do so, write the verdict, and kill the ranks.

        The node that notices first writes it; where that one is lost, the others do.
        """
        patience_s = GATHER_S if self._is_first() else 2 * GATHER_S
        process_inspection.ask(self.beats, self.local, self.attempt)
        self._publish(answered=True)
        verdict, until = self.attempt / "hang.json", time.monotonic() + patience_s
        while not verdict.exists():
            seen = {rank: {**item, "answered": True} for rank, item in self.beats.items()}
            seen = gathered(self.attempt) | seen
            if sum(item["answered"] for item in seen.values()) < self.world and time.monotonic() < until:
                time.sleep(POLL_S / 2)
                continue
            code = str(Path(__file__).resolve().parent.parent.parent)
            with suppress(OSError):
                write_json(verdict, hang_diagnosis.diagnose(seen, self.world, code) | {"time": time.time()})
            break
        for item in self.beats.values():
            if item["phase"] != "ended":
                process_inspection.kill(item, signal.SIGKILL)

    def _is_first(self) -> bool:
        try:
            (self.attempt / MARK).open("x").close()
        except OSError:
            return False
        return True


def _beat(path: Path) -> dict[str, Any] | None:
    """A rank's heartbeat; None where there is none, or half of one."""
    with suppress(OSError, ValueError):
        found = read_json(path)
        return found if isinstance(found, dict) else None
    return None


def folder(scratch: str, attempt: Path, node: int) -> Path:
    """Where the ranks of a node leave their heartbeats: on its own disk, by a name that no other job has."""
    name = hashlib.sha256(str(attempt).encode()).hexdigest()[:16]
    return Path(scratch) / f"muster-{os.getuid()}" / f"watch-{name}-{node}"


def start(config: Config, attempt: Path, where: Ranks) -> None:
    """Start the watchdog of this node, as a session of its own: what stops this rank does not stop that."""
    network = config.cluster.network
    words: list[object] = [sys.executable, "-m", "launcher.supervise.watchdog"]
    words += [folder(config.cluster.scratch, attempt, where.node_rank), attempt]
    words += ["--node", where.node_rank, "--here", where.local_world_size, "--world", where.world_size]
    words += ["--start", network.nccl_timeout_s, "--step", network.step_timeout_s, "--save", network.save_timeout_s]
    nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    # with the outputs of the rank srun would wait for this process, too
    os.posix_spawn(sys.executable, [str(word) for word in words], os.environ, file_actions=nothing, setsid=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.supervise.watchdog", description=__doc__)
    parser.add_argument("local", type=Path)
    parser.add_argument("attempt", type=Path)
    for name in ("node", "here", "world"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("start", "step", "save"):
        parser.add_argument(f"--{name}", type=float, required=True, help="limit, in seconds")
    options = parser.parse_args(words)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(
            number, signal.SIG_IGN
        )  # Slurm may send to every process of a step; the ranks decide when it ends
    try:
        Watchdog(options).run()
    except Exception:
        (options.attempt / f"watchdog-{options.node}.log").write_text(traceback.format_exc(), encoding="utf-8")
        raise


if __name__ == "__main__":
    main()
