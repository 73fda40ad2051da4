"""Lets several processes, on one or more nodes, write one result. Each writes whole files; they communicate through files only."""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from conf.errors import Problem, RunError
from conf.files import read_json
from jobs.consolidation.output_folder import Checksums
from jobs.consolidation.plan import Plan
from jobs.distributed.rank import rank_and_world_size

WAIT_S = 1800
"""How long ranks wait for each other to start."""


class Assignment(NamedTuple):
    rank_of_file: dict[str, int]
    finished: set[str]
    """Files that an earlier start finished; they are only read back."""


class RankCoordinator:
    """Coordinates the ranks of a job that write `target` together. Rank 0 assigns the files, and publishes when all are done.

    Every rank writes a hello with a random id, and rank 0 answers these ids. So nobody mistakes a file that a killed start left
    behind for one of this start. A rank writes whole files: if two nodes write into one page of a file, network file systems
    lose data.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.folder = target, target.with_name(f".{target.name}.ranks")
        self.rank, self.size = rank_and_world_size()
        self.id = uuid.uuid4().hex
        self._ids: dict[int, str] = {}
        """On rank 0: the ids of the others, by rank."""

    @property
    def alone(self) -> bool:
        """Whether there is only one rank."""
        return self.size == 1

    def __enter__(self) -> "RankCoordinator":
        if not self.alone:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Rank 0 removes the folder, which tells the others that it has ended; another rank that fails reports why."""
        if self.alone:
            return
        if self.rank == 0:
            removed = self.folder.with_name(f"{self.folder.name}.{self.id}")
            with suppress(FileNotFoundError):  # somebody else has deleted it
                self.folder.rename(removed)  # atomic: from now on the others find no folder, rather than half of one
                shutil.rmtree(removed, ignore_errors=True)
        elif error is not None:
            self._send(f"failed-{self.rank}.json", {"own": self.id, "said": str(error)})

    def assign_files(self, plan: Plan, finished: set[str]) -> dict[str, int]:
        """On rank 0: wait for the other ranks, and tell them which rank writes and reads back which file.

        Raises RunError if a rank does not come within WAIT_S, or has made another plan.
        """
        rank_of_file = assign(plan, finished, self.size)
        if self.alone:
            return rank_of_file
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
        began, digest = time.monotonic(), plan.digest()
        self._wait_until(lambda: self._all_said_hello(began, digest))
        self._send("shares.json", {"to": self._ids, "files": rank_of_file, "done": sorted(finished)})
        return rank_of_file

    def _all_said_hello(self, began: float, digest: str) -> bool:
        hellos = {rank: read_json(self.folder / f"hello-{rank}.json") for rank in range(1, self.size)}
        missing = [rank for rank, hello in hellos.items() if hello is None]
        if missing and time.monotonic() - began > WAIT_S:
            message = f"ranks {missing} did not start within {WAIT_S} s; if there is one process only, unset WORLD_SIZE"
            raise RunError(Problem("WORLD_SIZE", self.size, message))
        for rank, hello in hellos.items():
            if hello and hello["digest"] != digest:
                message = "found another checkpoint or base than rank 0: check that all nodes see the same files"
                raise RunError(Problem("rank", rank, message))
        self._ids = {rank: hello["own"] for rank, hello in hellos.items() if hello}
        return not missing

    def wait_for_assignment(self, plan: Plan) -> Assignment:
        """On the other ranks. Raises RunError if rank 0 has ended, or does not answer within WAIT_S."""
        hello, began, digest = self.folder / f"hello-{self.rank}.json", time.monotonic(), plan.digest()
        answer: dict[str, Any] = {}

        def is_answered() -> bool:
            shares = read_json(self.folder / "shares.json")
            if shares and shares["to"].get(str(self.rank)) == self.id:
                answer.update(shares)
                return True
            if not self.folder.exists():
                raise RunError(Problem("model", self.target, "rank 0 has ended: see its log"))
            if not hello.exists():  # rank 0 started later than this rank, and deleted the first one
                self._send(hello.name, {"own": self.id, "digest": digest})
            if time.monotonic() - began > WAIT_S:
                raise RunError(Problem("RANK", self.rank, f"rank 0 did not start within {WAIT_S} s: see its log"))
            return False

        self._wait_until(is_answered)
        return Assignment(answer["files"], set(answer["done"]))

    def report_done(self, checksums: Checksums) -> None:
        """On the other ranks: all assigned files are written and read back. Waits until rank 0 has ended.

        Raises RunError if rank 0 has not published the result.
        """
        self._send(f"done-{self.rank}.json", {"own": self.id, "sums": checksums})
        self._wait_until(lambda: not self.folder.exists())
        if read_json(self.target / "muster.json") is None:
            raise RunError(Problem("model", self.target, "was not published: see the log of rank 0"))

    def wait_for_all(self) -> Checksums:
        """On rank 0: the checksums of the files of all other ranks. Raises RunError with the error of a rank that failed."""
        checksums: Checksums = {}
        for rank, rank_id in self._ids.items():
            report = self._wait_for_report(rank, rank_id)
            if "said" in report:
                raise RunError(Problem("rank", rank, report["said"]))
            checksums |= report["sums"]
        return checksums

    def _wait_for_report(self, rank: int, rank_id: str) -> dict[str, Any]:
        """What a rank reports at its end: `sums`, or as `said` why it failed."""
        report: dict[str, Any] = {}

        def has_reported() -> bool:
            for kind in ("failed", "done"):
                content = read_json(self.folder / f"{kind}-{rank}.json")
                if content and content["own"] == rank_id:
                    report.update(content)
            return bool(report)

        self._wait_until(has_reported)
        return report

    def _send(self, name: str, value: dict[str, Any]) -> None:
        """Write a file for the other ranks, atomically. If rank 0 has removed the folder, nobody reads it any more."""
        temporary = self.folder / f".{name}.{self.id}"
        with suppress(FileNotFoundError):
            temporary.write_text(json.dumps(value), encoding="utf-8")
            temporary.rename(self.folder / name)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        pause_s = 0.05
        while not condition():
            time.sleep(pause_s)
            pause_s = min(2.0, pause_s * 1.5)
            with suppress(FileNotFoundError):
                os.listdir(self.folder)  # makes a network file system refresh what it has cached of the folder


def assign(plan: Plan, finished: set[str], ranks: int) -> dict[str, int]:
    """File -> rank. The largest file goes first, each to the rank with the least work. Finished files are only read back."""
    rank_of_file, work = {}, [0] * ranks
    for name in sorted(plan.sizes, key=lambda name: (name in finished, -plan.sizes[name], name)):
        rank = work.index(min(work))
        rank_of_file[name] = rank
        # a file that is written costs four times its size: fp32 is read (2), bf16 written (1) and read back (1)
        work[rank] += plan.sizes[name] if name in finished else 4 * plan.sizes[name]
    return rank_of_file
