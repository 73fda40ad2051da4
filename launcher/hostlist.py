"""Expands Slurm's lists of nodes, such as `n[1-2,5],gpu-a[01-03]-ib`, without Slurm: some sites have no scontrol on nodes.

Standard library only: this also runs on the node's own Python, outside a container.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
from itertools import product

RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
ITEM = rf"(?:[^,\[\]\s]|{RANGES})+"
"""One name with its ranges."""
MAX_HOSTS = 100_000
"""More hosts than any cluster has. A list that names more is not a list of nodes."""


def expand(nodelist: str) -> list[str]:
    """Return the hosts of a list in their order. Ranks are numbered in this order.

    Raises ValueError for a text that is not a list of nodes.
    """
    if not re.fullmatch(f"{ITEM}(,{ITEM})*", nodelist):
        raise ValueError(f"{nodelist!r} is not a list of nodes")
    hosts: list[str] = []
    for match in re.finditer(ITEM, nodelist):
        parts = re.split(r"\[([^\]]*)\]", match[0])  # text, ranges, text, ranges, ..., text
        choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(words) for words in product(*choices)]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """Expand `1-3,07-08` to 1, 2, 3, 07, 08. A leading zero sets the width."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if int(last or first) - int(first) >= MAX_HOSTS:
            raise ValueError(f"{ranges!r} names too many nodes")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers
