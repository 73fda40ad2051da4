"""Settles what a config leaves to the estimate of memory: what is recomputed, how many rows a rank holds at once, and whether
gathered parameters stay until backward; pure."""

from collections.abc import Iterator
from copy import deepcopy

from conf.batch import copies
from conf.choices import Backend, Checkpointing
from conf.schema import Config
from launcher.estimate.memory import estimate
from launcher.estimate.table import GIB, Estimate, gib

MODES = (Checkpointing.none, Checkpointing.selective, Checkpointing.full, Checkpointing.offload)
"""From the fastest: 9,579, 8,831 and 8,025 tok/s a GPU with 8B on H200s; the copies of `offload` come on top."""
ENOUGH = 16_384
"""Tokens that keep a GPU busy: twice as many as 8192 gained 9 % with 8B on H200s, and the measured runs end there."""
MARGIN = 0.95
"""Share of a GPU's memory that an estimate may take to be chosen: what was measured was at most 4 % more."""


RESHARD = "parallel.reshard_after_forward"
Choice = tuple[Checkpointing, int, bool]
"""Mode of recomputation, rows at once, and whether parameters are freed after forward and gathered again."""


def settled(config: Config) -> tuple[Config, list[str]]:
    """The config with `train.activation_checkpointing=auto` and the nulls of `train.micro_batch` and
    `parallel.reshard_after_forward` replaced, and lines that say by what.

    The config must have passed the other checks. Where nothing fits, what takes least is chosen, for `checks` to refuse.
    """
    keys = _open(config)
    if not keys:
        return config, []
    part, known = config.cluster.train, config.cluster.train.gpu_memory_gib
    if not part.gpus_per_node:  # memory is not what limits CPUs
        return _with(config, (Checkpointing.none, 1, True)), []
    if known is None or estimate(config) is None:
        found = _with(config, (Checkpointing.full, 1, True))
        return found, [f"chosen    {_said(found, keys)}: {_unknown(config)}"]
    candidates = list(_candidates(config))
    for tried in candidates:
        if (size := estimate(tried)) and _fits(size, tried, MARGIN * known * GIB):
            taken = gib(size.device.total)
            why = f"the fastest that fits, estimated at {taken} of {known:g} GiB a GPU"
            return tried, [f"chosen    {_said(tried, keys)}: {why}"]
    return candidates[-1], [f"chosen    {_said(candidates[-1], keys)}: takes least"]


def _open(config: Config) -> list[str]:
    """Keys that are left to the estimate."""
    found = ["train.activation_checkpointing"] if config.train.activation_checkpointing is Checkpointing.auto else []
    found += ["train.micro_batch"] if config.train.micro_batch is None else []
    shards = config.parallel.backend is Backend.fsdp and config.parallel.shard_ranks != 1
    return [*found, RESHARD] if shards and config.parallel.reshard_after_forward is None else found


def _candidates(config: Config) -> Iterator[Config]:
    """From the fastest: recomputing costs more than small micro batches do, so first the mode that fits one row, or what
    was asked for; then for this mode the most rows, down to one; then parameters that stay. The last one takes least."""
    asked, train = config.train.activation_checkpointing, config.train
    modes = [asked] if asked is not Checkpointing.auto else _allowed(config)
    sizes = [train.micro_batch] if train.micro_batch is not None else _sizes(config)
    again = [False, True] if RESHARD in _open(config) else [True]
    yield from (_with(config, (mode, size, last)) for mode in modes for size in sizes for last in again)


def _allowed(config: Config) -> list[Checkpointing]:
    """Host memory limits `offload`: where the site does not say what a node has, it is not chosen by itself."""
    return [*MODES] if config.cluster.train.memory_gib else [*MODES[:-1]]


def _sizes(config: Config) -> list[int]:
    """Rows that a rank may hold at once, the most first: divisors of what it has a step, within ENOUGH tokens."""
    part = config.cluster.train
    rows = config.train.global_batch * copies(config) // (part.nodes * part.ranks_per_node)
    tokens = config.data.max_length // config.parallel.context_ranks
    return [size for size in range(rows, 0, -1) if rows % size == 0 and (size == 1 or size * tokens <= ENOUGH)]


def _fits(found: Estimate, config: Config, capacity: float) -> bool:
    host = (config.cluster.train.memory_gib or 0) * GIB
    return found.device.total <= capacity and (not host or found.host.total <= host)


def _unknown(config: Config) -> str:
    if config.cluster.train.gpu_memory_gib is None:
        return "what most likely fits; with cluster.train.gpu_memory_gib the fastest that fits is taken"
    return "what most likely fits: without model.architecture nothing is estimated"


def _with(config: Config, choice: Choice) -> Config:
    """A copy with all three settled; what was asked for stays."""
    found = deepcopy(config)
    mode, size, again = choice
    if found.train.activation_checkpointing is Checkpointing.auto:
        found.train.activation_checkpointing = mode
    found.train.micro_batch = found.train.micro_batch or size
    if RESHARD in _open(config):
        found.parallel.reshard_after_forward = again
    return found


def _said(config: Config, keys: list[str]) -> str:
    values = {
        "train.activation_checkpointing": config.train.activation_checkpointing.name,
        "train.micro_batch": config.train.micro_batch,
        RESHARD: str(config.parallel.reshard_after_forward).lower(),
    }
    return " ".join(f"{key}={values[key]}" for key in keys)
