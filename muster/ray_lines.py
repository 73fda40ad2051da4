"""Sorts the lines that Ray passes on by the rank of the worker that wrote them. Standard library only."""

from __future__ import annotations  # the program's own Python may be 3.9

import re

COLOR = rb"(?:\x1b\[\d+m)*"
LINE = re.compile(
    COLOR + rb"\((?P<name>\w+)[^()]*? pid=(?P<pid>\d+)(?:, ip=(?P<ip>[^)]+))?\)" + COLOR + rb" ?(?P<text>.*)", re.S
)
"""How Ray marks the lines of other processes in the output of the program: `(RayTrainWorker pid=7, ip=10.0.0.2) step 1`."""
PLACED = re.compile(rb"\(ip=([^,)]+), pid=(\d+)\) world_rank=(\d+)")
"""How Ray Train says which process is which rank."""
WORKER = b"RayTrainWorker"
KEPT = 200
"""Lines of workers that are kept at most, in case that Ray Train never names their ranks."""
NOISE = b"PlacementGroupCleaner"
"""It writes a warning each second without Ray's dashboard, which would hide that the program is silent."""


class Marks:
    """Replaces Ray's marks in the output of the program by those of ranks, as torchrun would write them.

    Ray Train says which worker is which rank a moment after they have started. Until then this keeps their lines.
    """

    def __init__(self, mark: str, address: str) -> None:
        self.mark, self.address = mark.encode(), address.encode()
        self.ranks: dict[tuple[bytes, bytes], bytes] = {}
        self.kept: list[bytes] = []
        self.keeps = True

    def lines(self, line: bytes) -> list[bytes]:
        """Return what goes to the logs now that the program has written a line."""
        placed = PLACED.findall(line)
        for address, process, rank in placed:
            self.ranks[address, process] = self.ranks[b"", process] = rank
        if placed:
            marked = [self._marked(kept) for kept in self.kept]
            self.kept = [new for new, kept in zip(marked, self.kept, strict=True) if new == kept]
            return [*(new for new in marked if new not in self.kept), line]
        if len(self.kept) == KEPT:
            self.keeps = False
            return [*self.rest(), line]
        match = LINE.fullmatch(line)
        if match is None:
            return [line]
        if match["name"] == NOISE:
            return []
        if self.keeps and match["name"] == WORKER and self._rank(match) is None:
            self.kept.append(line)
            return []
        return [self._marked(line)]

    def rest(self) -> list[bytes]:
        """Return the lines that were kept."""
        kept, self.kept = self.kept, []
        return [self._marked(line) for line in kept]

    def _marked(self, line: bytes) -> bytes:
        match = LINE.fullmatch(line)
        rank = self._rank(match) if match else None
        return line if match is None or rank is None else b"[" + self.mark + rank + b"]:" + match["text"]

    def _rank(self, match: re.Match[bytes]) -> bytes | None:
        """Ray leaves out the address of the program's own node, and gives it another one than 127.0.0.1."""
        address = match["ip"] or (b"" if self.address.startswith(b"127.") else self.address)
        return self.ranks.get((address, match["pid"]))
