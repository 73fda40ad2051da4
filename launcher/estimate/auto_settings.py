"""Chooses the settings that a config leaves open, by the memory estimate: activation checkpointing, micro batch, and whether
FSDP keeps gathered parameters until backward; pure.
"""

from collections.abc import Iterator
from copy import deepcopy

from conf.batch import ranks_per_row
from conf.choices import Backend, Checkpointing, Init
from conf.schema import Config
from launcher.estimate.config_json import positions_of
from launcher.estimate.memory import estimate
from launcher.estimate.parameters import why_not_counted
from launcher.estimate.table import GIB, Estimate, gib

MODES = (Checkpointing.none, Checkpointing.selective, Checkpointing.full, Checkpointing.offload)
"""From the fastest: 9,579, 8,831 and 8,025 tok/s per GPU with 8B on H200s. `offload` also copies to the host."""
ENOUGH_TOKENS = 16_384
"""Tokens per micro batch that keep a GPU busy: 16,384 instead of 8192 gained 9 % with 8B on H200s. More were not measured."""
MARGIN = 0.95
"""An estimate may take this share of a GPU's memory: measured runs took at most 4 % more than estimated."""
RESHARD = "parallel.reshard_after_forward"


def choose(config: Config) -> tuple[Config, list[str]]:
    """A copy of the config with all settings chosen, and log lines that name them, or that warn of long rows.

    Chooses `train.activation_checkpointing` if it is auto, `train.micro_batch` and `parallel.reshard_after_forward` if they
    are null. The config must have passed the other checks. If nothing fits, the settings that need the least memory are chosen:
    `launcher.check.rules` then refuses the run.
    """
    config, lines = _choose(config)
    return config, [*lines, *_long_rows(config)]


def _long_rows(config: Config) -> list[str]:
    """A line if rows may be longer than those that the model was made for. Training runs, but such rows are new to it."""
    shape = config.model.architecture
    if shape is None or config.model.init is Init.random or config.data.max_length <= positions_of(shape):
        return []
    message = f"data.max_length={config.data.max_length} is more than the {positions_of(shape)} positions of the model "
    return [f"warning   {message}(max_position_embeddings, with rope scaling). Longer rows are new to it"]


def _choose(config: Config) -> tuple[Config, list[str]]:
    keys = _open_keys(config)
    if not keys:
        return config, []
    train = config.cluster.train
    if not train.gpus_per_node:  # memory is not what limits training on CPUs
        return _with(config, Checkpointing.none, micro_batch=1, reshard=True), []
    if train.gpu_memory_gib is None or estimate(config) is None:
        chosen = _with(config, Checkpointing.full, micro_batch=1, reshard=True)
        return chosen, [_line(chosen, keys, _why_nothing_is_estimated(config))]
    candidates = list(_candidates(config))
    for candidate in candidates:
        size = estimate(candidate)
        if size and _fits(size, candidate, MARGIN * train.gpu_memory_gib * GIB):
            why = (
                f"the fastest that fits, estimated at {gib(size.device.total)} of {train.gpu_memory_gib:g} GiB per GPU"
            )
            return candidate, [_line(candidate, keys, why)]
    return candidates[-1], [_line(candidates[-1], keys, "needs the least memory")]


def _open_keys(config: Config) -> list[str]:
    """Keys that are left for the estimate to choose."""
    keys = ["train.activation_checkpointing"] if config.train.activation_checkpointing is Checkpointing.auto else []
    keys += ["train.micro_batch"] if config.train.micro_batch is None else []
    fsdp_shards = config.parallel.backend is Backend.fsdp and config.parallel.shard_ranks != 1
    return [*keys, RESHARD] if fsdp_shards and config.parallel.reshard_after_forward is None else keys


def _candidates(config: Config) -> Iterator[Config]:
    """All choices, from the fastest. The last one needs the least memory.

    Recomputing costs more than small micro batches do. So the mode comes first, then the largest micro batch that fits with
    it, down to one row, then gathered parameters that stay until backward.
    """
    train = config.train
    modes = [train.activation_checkpointing]
    if train.activation_checkpointing is Checkpointing.auto:
        # `offload` needs host memory: it is never chosen where the site does not say how much a node has
        modes = [*MODES] if config.cluster.train.memory_gib else [*MODES[:-1]]
    sizes = [train.micro_batch] if train.micro_batch is not None else _micro_batches(config)
    reshards = [False, True] if RESHARD in _open_keys(config) else [True]
    for mode in modes:
        for size in sizes:
            for reshard in reshards:
                yield _with(config, mode, micro_batch=size, reshard=reshard)


def _micro_batches(config: Config) -> list[int]:
    """Micro batches from the largest: divisors of a rank's rows per step with at most ENOUGH_TOKENS tokens, and 1."""
    rows = config.train.global_batch * ranks_per_row(config) // config.cluster.train.ranks
    tokens = config.data.max_length // config.parallel.context_ranks
    return [size for size in range(rows, 0, -1) if rows % size == 0 and (size == 1 or size * tokens <= ENOUGH_TOKENS)]


def _fits(size: Estimate, config: Config, device_bytes: float) -> bool:
    host_bytes = (config.cluster.train.memory_gib or 0) * GIB
    return size.device.total <= device_bytes and (not host_bytes or size.host.total <= host_bytes)


def _why_nothing_is_estimated(config: Config) -> str:
    if config.cluster.train.gpu_memory_gib is None:
        return "most likely fits. Set cluster.train.gpu_memory_gib to get the fastest settings that fit"
    return f"most likely fits. Nothing is estimated, because {why_not_counted(config.model.architecture)}"


def _with(config: Config, mode: Checkpointing, *, micro_batch: int, reshard: bool) -> Config:
    """A copy in which the open settings have these values. Settings that the user made stay."""
    copy = deepcopy(config)
    if copy.train.activation_checkpointing is Checkpointing.auto:
        copy.train.activation_checkpointing = mode
    copy.train.micro_batch = copy.train.micro_batch or micro_batch
    if RESHARD in _open_keys(config):
        copy.parallel.reshard_after_forward = reshard
    return copy


def _line(config: Config, keys: list[str], why: str) -> str:
    values = {
        "train.activation_checkpointing": config.train.activation_checkpointing.name,
        "train.micro_batch": config.train.micro_batch,
        RESHARD: str(config.parallel.reshard_after_forward).lower(),
    }
    return f"chosen    {' '.join(f'{key}={values[key]}' for key in keys)}: {why}"
