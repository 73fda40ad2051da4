"""Several processes at one result, on one node or many: each has files of its own, and they meet in a folder, not by network."""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from conf.errors import Problem, RunError
from conf.files import read_json
from jobs.consolidation.plan import Plan
from jobs.distributed.rank import rank_and_world_size

WAIT_S = 1800
"""How long ranks may start after one another."""
Sums = dict[str, dict[str, str]]
"""Checksums of the tensors of each file."""


class Meeting:
    """The ranks of a job around `target`. Rank 0 says who writes what, and publishes when all have done so.

    Every rank says hello under a number of its own, and rank 0 answers those, so that what a killed start has left is never
    taken for this one's. Whole files are shared out, never parts of one: network file systems lose what two nodes write into
    one page.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.folder = target, target.with_name(f".{target.name}.ranks")
        self.rank, self.size = rank_and_world_size()
        self.own = uuid.uuid4().hex
        self._hellos: dict[int, str] = {}

    @property
    def alone(self) -> bool:
        return self.size == 1

    def __enter__(self) -> "Meeting":
        if not self.alone:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Rank 0 ends the meeting; another rank that fails tells it why."""
        if self.alone:
            return
        if self.rank == 0:
            over = self.folder.with_name(f"{self.folder.name}.{self.own}")
            with suppress(FileNotFoundError):  # somebody has tidied up
                self.folder.rename(over)  # at once: what is said from now on has nowhere to go
                shutil.rmtree(over, ignore_errors=True)
        elif error is not None:
            self._say(f"failed-{self.rank}.json", {"own": self.own, "said": str(error)})

    def share(self, plan: Plan, done: Sums) -> dict[str, int]:
        """On rank 0: wait for the others, and say which rank writes, and reads back, which file.

        Raises RunError where a rank does not come, or has found another plan.
        """
        found = shares(plan, set(done), self.size)
        if self.alone:
            return found
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
        began, digest = time.monotonic(), plan.digest()
        self._until(lambda: self._greeted(began, digest))
        self._say("shares.json", {"to": self._hellos, "files": found, "done": sorted(done)})
        return found

    def _greeted(self, began: float, digest: str) -> bool:
        hellos = {rank: read_json(self.folder / f"hello-{rank}.json") for rank in range(1, self.size)}
        missing = [rank for rank, hello in hellos.items() if hello is None]
        if missing and time.monotonic() - began > WAIT_S:
            said = f"ranks {missing} have not come within {WAIT_S} s: unset WORLD_SIZE where there is one process"
            raise RunError(Problem("WORLD_SIZE", self.size, said))
        for rank, hello in hellos.items():
            if hello and hello["digest"] != digest:
                said = "has found another checkpoint or base than rank 0: do all nodes see the same files?"
                raise RunError(Problem("rank", rank, said))
        self._hellos = {rank: hello["own"] for rank, hello in hellos.items() if hello}
        return not missing

    def join(self, plan: Plan) -> tuple[dict[str, int], set[str]]:
        """On another rank: who writes which file, and the files that are done. Raises RunError where nobody leads."""
        hello, began, digest = self.folder / f"hello-{self.rank}.json", time.monotonic(), plan.digest()
        answer: dict[str, Any] = {}

        def answered() -> bool:
            found = read_json(self.folder / "shares.json")
            if found and found["to"].get(str(self.rank)) == self.own:
                answer.update(found)
                return True
            if not self.folder.exists():
                raise RunError(Problem("model", self.target, "rank 0 has ended: see its log"))
            if not hello.exists():
                self._say(hello.name, {"own": self.own, "digest": digest})
            if time.monotonic() - began > WAIT_S:
                raise RunError(Problem("RANK", self.rank, f"rank 0 has not come within {WAIT_S} s: see its log"))
            return False

        self._until(answered)
        return answer["files"], set(answer["done"])

    def done(self, sums: Sums) -> None:
        """On another rank: all of its share is written and read back; wait until rank 0 has published the result."""
        self._say(f"done-{self.rank}.json", {"own": self.own, "sums": sums})
        self._until(lambda: not self.folder.exists())
        if read_json(self.target / "muster.json") is None:
            raise RunError(Problem("model", self.target, "was not published: see the log of rank 0"))

    def gather(self) -> Sums:
        """On rank 0: the checksums of all others' files. Raises RunError with what another rank failed of."""
        sums: Sums = {}
        for rank, own in self._hellos.items():
            found: dict[str, Any] = {}

            def told(rank: int = rank, own: str = own, found: dict[str, Any] = found) -> bool:
                for kind in ("failed", "done"):
                    told = read_json(self.folder / f"{kind}-{rank}.json")
                    if told and told["own"] == own:
                        found.update(told)
                return bool(found)

            self._until(told)
            if "said" in found:
                raise RunError(Problem("rank", rank, found["said"]))
            sums |= found["sums"]
        return sums

    def _say(self, name: str, value: dict[str, Any]) -> None:
        """Publish `value` to the other ranks. Once rank 0 has ended the meeting there is nobody to tell."""
        beside = self.folder / f".{name}.{self.own}"
        with suppress(FileNotFoundError):
            beside.write_text(json.dumps(value), encoding="utf-8")
            beside.rename(self.folder / name)

    def _until(self, ready: Callable[[], bool]) -> None:
        pause = 0.05
        while not ready():
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
            with suppress(FileNotFoundError):
                os.listdir(self.folder)  # network file systems look again at a folder that is opened


def shares(plan: Plan, done: set[str], size: int) -> dict[str, int]:
    """The rank of each file: the largest first, to the one with least to do. Files that are done are only read back."""
    found, load = {}, [0] * size
    for name in sorted(plan.sizes, key=lambda name: (name in done, -plan.sizes[name], name)):
        found[name] = load.index(min(load))
        load[found[name]] += plan.sizes[name] if name in done else 4 * plan.sizes[name]  # fp32 in, bf16 out, and back
    return found
