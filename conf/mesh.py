"""Draws how the ranks of a layout lie on nodes, as lines of text for the preview and the training log; pure."""

from collections.abc import Sequence

from conf.choices import Backend
from conf.plural import plural
from conf.schema_training import Parallel

MAX_NODES = 8
"""With more nodes than this, only the first and last ones are drawn."""
FIRST_NODES, LAST_NODES = 4, 1
MAX_RANKS = 16
"""The most ranks of a node that are drawn."""
INDENT = " " * 10


def picture(parallel: Parallel, nodes: int, ranks_per_node: int, hosts: Sequence[str] = ()) -> list[str]:
    """One line per node, one number per rank. Bars enclose the ranks that together hold one copy of the training state.

    `hosts` are the names of the nodes, if they are known. Ranks are numbered as in jobs/backends and
    jobs/distributed/process_group.py: those of one node follow each other, and so do those of one copy, of one row's tokens
    and of one matrix.
    """
    world = nodes * ranks_per_node
    names = list(hosts) or [f"node {number}" for number in range(nodes)]
    shown = range(nodes) if nodes <= MAX_NODES else [*range(FIRST_NODES), *range(nodes - LAST_NODES, nodes)]
    width = max(len(names[number]) for number in shown)
    size = f"{plural(world, 'rank')} on {plural(nodes, 'node')}"
    lines = [f"mesh      {parallel.name}: {size}; {description(parallel, world)}"]
    for number in shown:
        if number == nodes - LAST_NODES and nodes > MAX_NODES:
            lines.append(f"{INDENT}... {nodes - FIRST_NODES - LAST_NODES} more nodes ...")
        begin = number * ranks_per_node
        row = _row(parallel, world, range(begin, begin + ranks_per_node))
        lines.append(f"{INDENT}{names[number]:<{width}}  {row}".rstrip())
    return lines + [INDENT + line for line in _legend(parallel, world)]


def copy_ranks(parallel: Parallel, world: int) -> int:
    """Ranks that together hold one copy of the training state, of `world` ranks."""
    if parallel.backend is Backend.zero:
        return world
    return (parallel.shard_ranks or world // parallel.tensor_ranks) * parallel.tensor_ranks


def description(parallel: Parallel, world: int) -> str:
    """What each rank holds, in words."""
    size = copy_ranks(parallel, world)
    if parallel.backend is Backend.zero and parallel.zero_stage < 3:
        sharded = "optimizer state" if parallel.zero_stage == 1 else "gradients and optimizer state"
        return f"each rank holds the whole model, and 1/{world} of {sharded}"
    if size == 1:
        return "each rank holds the whole model, and gradients are averaged over all"
    state = f"1/{size} of parameters, gradients and optimizer state"
    if size == world:
        return f"each rank holds {state}"
    return f"{plural(world // size, 'copy')}; each rank holds {state}"


def _row(parallel: Parallel, world: int, ranks: range) -> str:
    """The ranks of a node: `|` where a copy begins or ends, `+` between ranks of one matrix, `~` between those of one row."""
    size, digits, text = copy_ranks(parallel, world), len(str(world - 1)), ""
    abbreviated = len(ranks) > MAX_RANKS
    for rank in [*ranks[: MAX_RANKS // 2], ranks[-1]] if abbreviated else ranks:
        if abbreviated and rank == ranks[-1]:
            text += " ..."
        text += f"{_separator(parallel, size, rank, rank == ranks[0])}{rank:>{digits}}"
    return text + (" |" if (ranks[-1] + 1) % size == 0 else "")


def _separator(parallel: Parallel, size: int, rank: int, first: bool) -> str:
    """The text to the left of a rank; `first` is the first rank of a node, `size` the number of ranks of a copy."""
    if rank % size == 0:
        return "| " if first else " | "
    if first:
        return "  "
    if rank % parallel.tensor_ranks:
        return "+"
    return "~" if rank % (parallel.tensor_ranks * parallel.context_ranks) else " "


def _legend(parallel: Parallel, world: int) -> list[str]:
    """What the signs in the picture mean, for those that are in it."""
    size, lines = copy_ranks(parallel, world), list[str]()
    if 1 < size < world:
        replicas = range(0, world, size)
        ranks = " ".join(map(str, replicas[:4])) + (" ..." if len(replicas) > 4 else "")
        lines.append(f"|: one copy; ranks {ranks} hold the same part of it, and average its gradients")
    if parallel.tensor_ranks > 1:
        lines.append("+: these ranks share each matrix of a block")
    if parallel.context_ranks > 1:
        lines.append("~: these ranks share the tokens of a row")
    return lines
