"""Names, in one line, the rank that a hanging job waits for, from what the watchdogs of its nodes have collected. Pure."""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from launcher.run_folder.status import HANG

Evidence = Mapping[str, Any]
"""What is known about one rank: its last heartbeat, and in addition

- `answered`: whether the watchdog of its node has inspected the rank since it fell silent;
- `state`: the letter of the process's state in /proc;
- `stack`: its Python stacks, as faulthandler writes them;
- `flight`: see `read_flight_record`."""


class Frame(NamedTuple):
    """One line of a Python stack."""

    file: str
    line: int
    function: str


class PositionKind(Enum):
    """What a rank is doing."""

    UNKNOWN = "unknown"
    """It wrote no Python stack."""
    COLLECTIVE = "collective"
    """It is inside an operation of torch.distributed, so it waits for other ranks."""
    CODE = "code"
    """It is anywhere else."""


@dataclass(frozen=True)
class Position:
    """Where in the code a rank is."""

    kind: PositionKind
    location: str = ""
    """The innermost line of Muster's own code, e.g. `jobs/train.py:121 _step`."""
    operation: str = ""
    """Name of the collective, e.g. `all_reduce`."""
    library_call: str = ""
    """What that line is calling, e.g. `fsync (os.py:7)`; empty if the line itself is running."""

    def __str__(self) -> str:
        if self.kind is PositionKind.UNKNOWN:
            return ""
        if self.kind is PositionKind.COLLECTIVE:
            return f"in {self.operation} ({self.location})"
        return f"at {self.location}" + (f", inside {self.library_call}" if self.library_call else "")


class Progress(NamedTuple):
    """How far a rank has come. Compared field by field: the rank with the smallest value is the one the others wait for."""

    answered: bool
    """False: neither the rank nor the watchdog of its node has answered."""
    can_run: bool = False
    """False: the process is stopped, dead or stuck in a system call. Compared before the counts, because NCCL's threads
    of a stopped process still send for steps that it has already launched."""
    heartbeats: int = 0
    """All ranks send heartbeats equally often."""
    in_collective: bool = False
    """Of ranks with equal counts, the one outside a collective keeps the others waiting."""
    at_common_position: bool = False
    """Whether it is at the position that most ranks share."""
    last_collective: int = 0
    """Number of the newest collective that it passed to NCCL."""


FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
COLLECTIVE_CODE = ("/torch/distributed/", "/deepspeed/comm/")
NOT_COLLECTIVE = ("/torch/distributed/checkpoint/", "c10d_logger.py")
"""Parts of COLLECTIVE_CODE that are no collective themselves: a rank that waits for a disk does not wait for other ranks."""
STATES = {
    "T": "process stopped (T)",
    "t": "process held by a debugger (t)",
    "D": "process in a system call that does not return (D)",
    "Z": "process dead (Z)",
}
REMEDY = {
    "T": "something has stopped the process (kill -STOP, a debugger, or the site's power or memory guard)",
    "t": "detach the debugger",
    "D": "a file system or a device of the node does not answer: if this happens again, exclude the node "
    "(cluster.train.exclude=NODE)",
    "network": "no rank is behind, so check the network between the nodes: pipeline=preflight measures it",
    "node": "the node or its connection is lost: if this happens again, exclude it (cluster.train.exclude=NODE)",
}
ABSENT_REMEDY = (
    "this rank has never started: if its node only starts slowly, raise cluster.network.nccl_timeout_s; if this happens again, "
    "exclude the node (cluster.train.exclude=NODE)"
)
OTHER_REMEDY = (
    "read the Python stacks of all ranks in attempt-N/rank-R.stack, beside its log; if it was only slow, raise {key}"
)
LIMITS = {"train": "step", "evaluate": "step", "save": "save"}
"""Phases with their own limit. All other phases use cluster.network.nccl_timeout_s."""


def limit_key(phase: str) -> str:
    """Return the config key that limits how long a rank may be silent in a phase."""
    return f"cluster.network.{LIMITS.get(phase, 'nccl')}_timeout_s"


def diagnose(ranks: Mapping[int, Evidence], world_size: int, code: str) -> dict[str, Any]:
    """Return the verdict: which rank the others wait for, where that rank is, and where the others are.

    `ranks` may lack ranks that have never written a heartbeat. `code` is the folder of Muster's code.
    """
    no_heartbeat = {"answered": False, "count": -1, "step": 0, "phase": "start"}
    evidence: dict[int, Evidence] = {rank: ranks.get(rank, no_heartbeat) for rank in range(world_size)}
    # Nobody waits for a rank that has ended, unless all have.
    running = {rank: item for rank, item in evidence.items() if item.get("phase") != "ended"} or evidence
    positions = {rank: locate(item, code) for rank, item in running.items()}
    common_position = Counter(positions.values()).most_common(1)[0][0]
    progress = {rank: _progress(item, positions[rank], common_position) for rank, item in running.items()}
    least = min(progress.values())
    behind = sorted(rank for rank in running if progress[rank] == least)
    first = running[behind[0]]
    step, key = f"step {first['step']}, phase {first['phase']}", limit_key(str(first["phase"]))
    silent = f" (silent for {max(item.get('silent_s', 0) for item in running.values()):.0f} s, {key})"
    if len(behind) == len(running) > 1:  # all ranks have come equally far, so none is the cause
        where = f" {common_position}" if str(common_position) else ""
        reason = f"all {len(running)} ranks hang{where}: {step}; none is behind"
        slow = f"; if ranks only start slowly, raise {key}" if first["phase"] == "start" else ""
        return _verdict(reason + silent, REMEDY["network"] + slow, None, {**first, "host": ""})
    # The positions of ranks that did not answer are old, so leave them out.
    others = {
        rank: position for rank, position in positions.items() if rank not in behind and running[rank].get("answered")
    }
    doing = _describe_activity(first, positions[behind[0]])
    reason = f"{_describe_ranks(behind, first)}: {step}, {doing}{_describe_others(others)}"
    state = str(first.get("state")) if first.get("answered") else "node"
    remedy = ABSENT_REMEDY if first["count"] < 0 else REMEDY.get(state) or OTHER_REMEDY.format(key=key)
    return _verdict(reason + silent, remedy, behind[0], first)


def _verdict(reason: str, remedy: str, rank: int | None, evidence: Evidence) -> dict[str, Any]:
    return {
        "status": HANG,
        "reason": reason,
        "remedy": remedy,
        "rank": rank,
        "host": evidence.get("host", ""),
        "error": evidence.get("stack", ""),
        "step": evidence.get("step"),
        "phase": evidence.get("phase"),
    }


def _progress(evidence: Evidence, position: Position, common_position: Position) -> Progress:
    if not evidence.get("answered"):
        return Progress(answered=False)
    return Progress(
        answered=True,
        can_run=evidence.get("state") not in STATES,
        heartbeats=evidence["count"],
        in_collective=position.kind is PositionKind.COLLECTIVE,
        at_common_position=position == common_position,
        last_collective=(evidence.get("flight") or {}).get("last", 0),
    )


def _describe_ranks(behind: Sequence[int], first: Evidence) -> str:
    on_host = f" on {first['host']}" if first.get("host") else ""
    if len(behind) == 1:
        return f"rank {behind[0]}{on_host} hangs"
    return f"ranks {', '.join(map(str, behind))} hang, first rank {behind[0]}{on_host}"


def _describe_activity(evidence: Evidence, position: Position) -> str:
    if not evidence.get("answered"):
        return "no heartbeat ever came" if evidence["count"] < 0 else "and the watchdog of its node does not answer"
    return STATES.get(str(evidence.get("state"))) or str(position) or "without a Python stack"


def _describe_others(others: Mapping[int, Position]) -> str:
    """Say where most of the other ranks wait; empty if that is unknown."""
    if not others:
        return ""
    [(common_position, count)] = Counter(others.values()).most_common(1)
    if common_position.kind is PositionKind.UNKNOWN:
        return ""
    if len(others) == 1:
        return f"; rank {next(iter(others))} waits {common_position}"
    who = "the others" if count == len(others) else f"{count} of {len(others)} others"
    return f"; {who} wait {common_position}"


def locate(evidence: Evidence, code: str) -> Position:
    """Return where a rank is, from its Python stacks and, for the collective's name, NCCL's flight recorder."""
    root = code.rstrip("/") + "/"
    stacks = working_stacks(parse_stacks(evidence.get("stack", "")), root)
    if not stacks:
        return Position(PositionKind.UNKNOWN)
    innermost = stacks[0][0]
    # The innermost line of our own code says more than one inside torch.
    own = next((frame for frame in stacks[0] if frame.file.startswith(root)), innermost)
    location = f"{own.file.removeprefix(root)}:{own.line} {own.function}"
    # A rank that waits for its GPU shows no collective in Python, so ask the flight recorder.
    operation = collective_name(stacks) or (evidence.get("flight") or {}).get("waits")
    if operation:
        return Position(PositionKind.COLLECTIVE, location, operation=operation)
    if innermost == own:
        return Position(PositionKind.CODE, location)
    file_name = innermost.file.rpartition("/")[2]
    return Position(PositionKind.CODE, location, library_call=f"{innermost.function} ({file_name}:{innermost.line})")


def parse_stacks(text: str) -> list[list[Frame]]:
    """Parse faulthandler's text into the frames of each thread, innermost first. The main thread comes last."""
    stacks: list[list[Frame]] = []
    for line in text.splitlines():
        if "(most recent call first)" in line:
            stacks.append([])
        elif (match := FRAME.match(line)) and stacks:
            stacks[-1].append(Frame(match[1], int(match[2]), match[3]))
    return [frames for frames in stacks if frames]


def working_stacks(stacks: list[list[Frame]], root: str) -> list[list[Frame]]:
    """Return the stack that shows what a rank is doing, followed by those of threads that work for it.

    This is the main thread, unless the main thread only joins one of our own threads, e.g. the one that writes a
    checkpoint. Then it is that thread.
    """
    if not stacks:
        return []
    *others, main = stacks
    innermost = main[0]
    if innermost.file.endswith("/threading.py") and innermost.function in ("join", "_wait_for_tstate_lock"):
        ours = [frames for frames in others if any(frame.file.startswith(root) for frame in frames)]
        return ours[:1] or [main]
    if innermost.file.endswith("/torch/autograd/graph.py"):  # on GPUs, autograd runs backward in threads of its own
        return [main, *(frames for frames in others if any(COLLECTIVE_CODE[0] in frame.file for frame in frames))]
    return [main]


def collective_name(stacks: Sequence[Sequence[Frame]]) -> str | None:
    """Return the function of torch.distributed that the first of these stacks is in; None if none is in one."""
    for frames in stacks:
        for frame in frames:
            in_collective = any(part in frame.file for part in COLLECTIVE_CODE)
            if in_collective and not any(part in frame.file for part in NOT_COLLECTIVE):
                return frame.function
    return None


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values only: loading an object of a class could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a flight recorder's file")


def read_flight_record(dump: bytes) -> dict[str, Any] | None:
    """Parse a dump of torch's flight recorder; None if it cannot be parsed.

    Returns `last`, the number of the newest collective, and `waits`, the name of the oldest unfinished one (or None).
    """
    try:
        entries = _PlainUnpickler(io.BytesIO(dump)).load()["entries"]
        last = max(int(entry["record_id"]) for entry in entries)
        unfinished = (entry["profiling_name"] for entry in entries if entry["state"] != "completed")
        return {"last": last, "waits": next(unfinished, None)}
    except Exception:  # torch may change the format; the rest of the diagnosis must still work
        return None
