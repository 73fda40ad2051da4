"""Names the rank that a hanging job waits for, in one line, from what the watchdogs of its nodes have seen; pure."""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.run_folder.status import HANG

Frame = tuple[str, int, str]
"""File, line and function."""
Evidence = Mapping[str, Any]
"""Of one rank: its last heartbeat, and with it `state` (the letter in /proc), `stack` (faulthandler's text), `flight` (see
`flight`) and `answered`, whether the watchdog of its node has looked at it since the silence began."""

FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")
OTHERS = ("/torch/distributed/checkpoint/", "c10d_logger.py")
"""What of it is no collective by itself: a rank that waits for a disk is not one that waits for others."""
STATES = {
    "T": "process stopped (T)",
    "t": "process held by a debugger (t)",
    "D": "process in a system call that does not return (D)",
    "Z": "process dead (Z)",
}
REMEDY = {
    "T": "something has stopped the process (kill -STOP, a debugger, the site's power or memory guard)",
    "t": "detach the debugger",
    "D": "a file system or device of the node does not answer: leave the node out (cluster.train.exclude=NODE) if this comes again",
    "network": "no rank is behind, so look at the network between the nodes: pipeline=preflight measures it",
    "node": "the node or its connection is lost: leave it out (cluster.train.exclude=NODE) if this comes again",
}
ELSE = (
    "the Python stacks of all ranks are beside its log, in attempt-N/rank-R.stack; where it was only slow, raise {key}"
)
LIMITS = {"train": "step", "evaluate": "step", "save": "save"}
"""The phases that have a limit of their own; all others have that of the start, cluster.network.nccl_timeout_s."""


def limit_key(phase: str) -> str:
    """The setting that says how long a rank may be silent in a phase."""
    return f"cluster.network.{LIMITS.get(phase, 'nccl')}_timeout_s"


def diagnose(ranks: Mapping[int, Evidence], world_size: int, code: str) -> dict[str, Any]:
    """The verdict: which rank the others wait for, where it is and where they are. `code` is the folder of Muster's code."""
    missing = {"answered": False, "count": -1, "step": 0, "phase": "start"}
    whole: dict[int, Evidence] = {rank: ranks.get(rank, missing) for rank in range(world_size)}
    left = {rank: item for rank, item in whole.items() if item.get("phase") != "ended"} or whole
    places = {rank: place(item, code) for rank, item in left.items()}
    usual = Counter(places.values()).most_common(1)[0][0]
    keys = {rank: _key(item, places[rank], usual) for rank, item in left.items()}
    behind = sorted(rank for rank in left if keys[rank] == min(keys.values()))
    first = left[behind[0]]
    step, key = f"step {first['step']}, phase {first['phase']}", limit_key(str(first["phase"]))
    silent = f" (silent for {max(item.get('silent_s', 0) for item in left.values()):.0f} s, {key})"
    if len(behind) == len(left) > 1:
        reason = f"all {len(left)} ranks hang{_at(usual)}: {step}; none is behind"
        return _verdict(reason + silent, REMEDY["network"], None, {**first, "host": ""})
    others = {rank: text for rank, text in places.items() if rank not in behind and left[rank].get("answered")}
    on = f" on {first['host']}" if first.get("host") else ""
    who = f"rank {behind[0]}{on} hangs"
    if len(behind) > 1:
        who = f"ranks {', '.join(map(str, behind))} hang, first rank {behind[0]}{on}"
    reason = f"{who}: {step}, {_doing(first, places[behind[0]])}{_waiting(others)}"
    remedy = REMEDY["node"] if not first.get("answered") else REMEDY.get(str(first.get("state")), ELSE.format(key=key))
    return _verdict(reason + silent, remedy, behind[0], first)


def _verdict(reason: str, remedy: str, rank: int | None, item: Evidence) -> dict[str, Any]:
    return {
        "status": HANG,
        "reason": reason,
        "remedy": remedy,
        "rank": rank,
        "host": item.get("host", ""),
        "error": item.get("stack", ""),
        "step": item.get("step"),
        "phase": item.get("phase"),
    }


def _key(item: Evidence, at: str, usual: str) -> tuple[Any, ...]:
    """Smallest for the rank that is waited for: one not heard of, then one that cannot run, then the one that got least far.

    Where all got equally far, it is the one that does not wait in a collective, is elsewhere than most, or has asked NCCL
    for the fewest collectives. A stopped process comes before counts: NCCL's threads go on sending for steps already made.
    """
    if not item.get("answered"):
        return (0,)
    stopped, flight = item.get("state") in STATES, item.get("flight") or {}
    return 1, not stopped, item["count"], at.startswith("in "), at == usual, flight.get("last", 0)


def _doing(item: Evidence, at: str) -> str:
    if not item.get("answered"):
        return "no heartbeat ever came" if item["count"] < 0 else "and the watchdog of its node does not answer"
    return STATES.get(str(item.get("state"))) or at or "without a Python stack"


def _waiting(others: Mapping[int, str]) -> str:
    """What the other ranks do, where that is known."""
    [(usual, count)] = Counter(others.values()).most_common(1) or [("", 0)]
    if not usual:
        return ""
    who = "the others" if count == len(others) else f"{count} of {len(others)} others"
    if len(others) == 1:
        who = f"rank {next(iter(others))}"
    return f"; {who} {'waits' if len(others) == 1 else 'wait'} {usual}"


def _at(usual: str) -> str:
    return f" {usual}" if usual else ""


def place(item: Evidence, code: str) -> str:
    """Where a rank is: `in all_reduce (jobs/distributed/process_group.py:93 total)`, or `at jobs/train.py:121
    _step`, with what is called
    there; empty if unknown."""
    root = code.rstrip("/") + "/"
    stacks = at_work(threads(item.get("stack", "")), root)
    if not stacks:
        return ""
    frames, name = stacks[0], collective(stacks)
    own = next((frame for frame in frames if frame[0].startswith(root)), frames[0])
    where = f"{own[0].removeprefix(root)}:{own[1]} {own[2]}"
    name = name or (item.get("flight") or {}).get("waits")
    if name:
        return f"in {name} ({where})"
    file, line, function = frames[0]
    return f"at {where}" + (f", inside {function} ({file.rpartition('/')[2]}:{line})" if frames[0] != own else "")


def threads(text: str) -> list[list[Frame]]:
    """faulthandler's text as frames, innermost first, of each thread; it writes the main thread last."""
    found: list[list[Frame]] = []
    for line in text.splitlines():
        if "(most recent call first)" in line:
            found.append([])
        elif (match := FRAME.match(line)) and found:
            found[-1].append((match[1], int(match[2]), match[3]))
    return [frames for frames in found if frames]


def at_work(stacks: list[list[Frame]], root: str) -> list[list[Frame]]:
    """The stack that tells what a rank does, then those of threads that work for it: the main thread's, unless it waits for
    a thread of ours (one that writes a checkpoint) to end."""
    if not stacks:
        return []
    *others, main = stacks
    file, _, function = main[0]
    if file.endswith("/threading.py") and function in ("join", "_wait_for_tstate_lock"):
        ours = [frames for frames in others if any(frame[0].startswith(root) for frame in frames)]
        return ours[:1] or [main]
    if file.endswith("/torch/autograd/graph.py"):  # on GPUs autograd has threads of its own
        return [main, *(frames for frames in others if any(COLLECTIVE[0] in frame[0] for frame in frames))]
    return [main]


def collective(stacks: list[list[Frame]]) -> str | None:
    """What of torch.distributed the first of `at_work`'s stacks that is inside it does; None where none is."""
    for frames in stacks:
        for file, _, name in frames:
            if any(part in file for part in COLLECTIVE) and not any(part in file for part in OTHERS):
                return name
    return None


class _Plain(pickle.Unpickler):
    """Reads plain values, and nothing that would be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a flight recorder's file")


def flight(dump: bytes) -> dict[str, Any] | None:
    """Of torch's flight recorder: `last`, the number of the newest collective, and `waits`, the name of the oldest unfinished."""
    try:
        entries = _Plain(io.BytesIO(dump)).load()["entries"]
        last = max(int(entry["record_id"]) for entry in entries)
        waits: Iterable[str] = (entry["profiling_name"] for entry in entries if entry["state"] != "completed")
        return {"last": last, "waits": next(iter(waits), None)}
    except Exception:  # a format that torch may change is no reason to have no diagnosis
        return None
