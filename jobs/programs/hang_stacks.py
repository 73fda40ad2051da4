"""Reads the Python stacks of the ranks that hang: in the end of their output, or in the files of Ray's workers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

BEGIN = "(most recent call first)"
IN_COLLECTIVE = "/torch/distributed/"


def of_workers(folder: Path) -> dict[int, list[str]]:
    """Return the stack of Ray's workers by rank, from the files of `muster.beat`, without workers that train no more.

    Ray runs the training function in a thread beside the main one, whose number is in the first line of the file.
    """
    found = {}
    for path in folder.glob("*.stack"):
        thread, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        starts = [number for number, line in enumerate(lines) if BEGIN in line]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            if thread in lines[start]:
                found[int(path.stem)] = lines[start:end]
    return found


def text(last: Mapping[int, Sequence[str]]) -> str:
    """Return the stacks of all ranks. Those of a rank outside a collective, for which the others wait, come last.

    The launcher's diagnosis takes the last thread for the main one.
    """
    found = {rank: stacks for rank, lines in last.items() if (stacks := _stacks(lines))}
    ordered = sorted(found, key=lambda rank: (not _waits(found[rank]), rank))
    return "\n".join(f"rank {rank}:\n" + "\n".join(found[rank]) for rank in ordered)


def _stacks(lines: Sequence[str]) -> list[str]:
    first = next((number for number, line in enumerate(lines) if BEGIN in line), len(lines))
    return [line for line in lines[first:] if BEGIN in line or line.startswith("  File ")]


def _waits(stacks: Sequence[str]) -> bool:
    main = max(number for number, line in enumerate(stacks) if BEGIN in line)
    return any(IN_COLLECTIVE in line for line in stacks[main:])
