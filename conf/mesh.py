"""Draws how a model lies on ranks and nodes, as lines of text, for the preview and for the log of training; pure."""

from collections.abc import Sequence

from conf.choices import Backend
from conf.plural import plural
from conf.schema import Parallel

FIRST, LAST = 4, 1
"""Nodes that are drawn of more than `MANY`."""
MANY = 8
RANKS = 16
"""Ranks of a node that are drawn at most."""
INDENT = " " * 10


def picture(parallel: Parallel, nodes: int, ranks_per_node: int, hosts: Sequence[str] = ()) -> list[str]:
    """A row a node, a number a rank. Bars stand around the ranks that hold one copy of the training state between them.

    `hosts` are names of nodes, where they are known. Ranks follow each other through the nodes, those of a copy, of a row's
    tokens and of a matrix side by side, as jobs/backends and jobs/distributed/process_group.py number them.
    """
    world = nodes * ranks_per_node
    names = list(hosts) or [f"node {number}" for number in range(nodes)]
    shown = range(nodes) if nodes <= MANY else [*range(FIRST), *range(nodes - LAST, nodes)]
    width = max(len(names[number]) for number in shown)
    lines = [f"mesh      {parallel.name}: {plural(world, 'rank')} on {plural(nodes, 'node')}; {said(parallel, world)}"]
    for number in shown:
        if number == nodes - LAST and nodes > MANY:
            lines.append(f"{INDENT}... {nodes - FIRST - LAST} nodes more ...")
        begin = number * ranks_per_node
        row = _row(parallel, world, range(begin, begin + ranks_per_node))
        lines.append(f"{INDENT}{names[number]:<{width}}  {row}".rstrip())
    return lines + [INDENT + line for line in _legend(parallel, world)]


def copy_ranks(parallel: Parallel, world: int) -> int:
    """Ranks that hold one copy of the training state between them."""
    if parallel.backend is Backend.zero:
        return world
    return (parallel.shard_ranks or world // parallel.tensor_ranks) * parallel.tensor_ranks


def said(parallel: Parallel, world: int) -> str:
    """What a rank holds, in words."""
    size = copy_ranks(parallel, world)
    if parallel.backend is Backend.zero and parallel.zero_stage < 3:
        cut = "optimizer state" if parallel.zero_stage == 1 else "gradients and optimizer state"
        return f"each holds the whole model, and 1/{world} of {cut}"
    if size == 1:
        return "each holds the whole model, and gradients are averaged over all"
    state = f"1/{size} of parameters, gradients and optimizer state"
    return f"each holds {state}" if size == world else f"{plural(world // size, 'copy')}; each rank holds {state}"


def _row(parallel: Parallel, world: int, ranks: range) -> str:
    """The ranks of a node: `|` where a copy begins or ends, `+` between ranks of one matrix, `~` between those of one row."""
    size, digits, text = copy_ranks(parallel, world), len(str(world - 1)), ""
    many = len(ranks) > RANKS
    for rank in [*ranks[: RANKS // 2], ranks[-1]] if many else ranks:
        if many and rank == ranks[-1]:
            text += " ..."
        text += f"{_before(parallel, size, rank, rank == ranks[0])}{rank:>{digits}}"
    return text + (" |" if (ranks[-1] + 1) % size == 0 else "")


def _before(parallel: Parallel, size: int, rank: int, first: bool) -> str:
    """What stands to the left of a rank."""
    if rank % size == 0:
        return "| " if first else " | "
    if first:
        return "  "
    if rank % parallel.tensor_ranks:
        return "+"
    return "~" if rank % (parallel.tensor_ranks * parallel.context_ranks) else " "


def _legend(parallel: Parallel, world: int) -> list[str]:
    size, found = copy_ranks(parallel, world), list[str]()
    if 1 < size < world:
        alike = [*range(0, world, size)]
        same = " ".join(map(str, alike[:4])) + (" ..." if len(alike) > 4 else "")
        found.append(f"bars: one copy; ranks {same} hold the same part of it, and average its gradients")
    if parallel.tensor_ranks > 1:
        found.append("+: these share every matrix of a block")
    if parallel.context_ranks > 1:
        found.append("~: these share the tokens of a row")
    return found
