"""Estimates memory: bytes a GPU, a host and on disk for a Config, before anything is queued; pure.

Formulas follow what jobs/backends really does, and are compared with measured runs in
tests/launcher/estimate/test_memory.py and docs/memory.md.
"""

from dataclasses import dataclass, replace

from conf.batch import split
from conf.choices import AdapterKind, Backend, Frozen, OutputDtype
from conf.mesh import copy_ranks
from conf.schema import Config
from launcher.estimate.activations import Loss, activation_bytes, logit_bytes, offloaded_bytes, shape_of, width_of
from launcher.estimate.bytes_per_weight import frozen_bytes, frozen_width, moment_bytes
from launcher.estimate.parameters import Counts, count, experts
from launcher.estimate.table import GIB, Device, Disk, Estimate, Host

CONTEXT = 1.5 * GIB
"""Outside torch's allocator: CUDA context and modules, about 0.5 GiB, and NCCL's channels, about 1 GiB with 8 peers."""
PROCESS = 3 * GIB
"""Host memory of a rank beside its weights: Python, torch, CUDA libraries. Rows are mapped from disk and not counted."""
READING = 4 * 2**24
"""Host buffers of a rank that reads its slices of the weights (jobs/tensor_io/slices.py)."""
SLACK = 0.05
"""Share of what comes and goes that the caching allocator loses to fragments; from the measured runs."""
UNPACKED = {Frozen.full: 0, Frozen.float8: 1}
"""Bytes of a weight of the frozen base that is multiplied, beside what is kept; others are unpacked to the precision of compute."""
SUB_GROUP, LIVE = 10**9, 10**9
"""ZeRO-3's sub_group_size and stage3_max_live_parameters in conf/deepspeed.py, in elements."""


@dataclass(frozen=True)
class Loop:
    """How the training loop works where no key of a config says it; the defaults are what jobs/ does today."""

    loss: Loss = Loss.fused
    fused_kernels: bool = False
    """Norms and SwiGLU keep only their inputs: Liger's kernels, or torch.compile's, of a block or of these alone."""
    compiled: bool = False
    """Blocks are compiled."""
    fused_optimizer: bool = True
    """AdamW in one kernel, as jobs/training/optimizer.py asks for where weights are on a GPU; else ZeRO's step holds
    one more fp32 tensor."""
    sliced_loading: bool = True
    """Every rank reads its own slices of the weights; else each builds the whole model on its host, then shards it."""


def loop_of(config: Config) -> Loop:
    """How jobs/ will train: compiled as jobs/model/prepare.py decides, whole or in pieces, where torch's GPU build
    brings triton."""
    if config.train.compile is not None:
        return Loop(fused_kernels=config.train.compile, compiled=config.train.compile)
    by_stage_3 = config.parallel.backend is Backend.zero and config.parallel.zero_stage == 3
    on_gpu = config.cluster.train.gpus_per_node != 0
    in_pieces = by_stage_3 and config.adapter.kind is not AdapterKind.none
    return Loop(fused_kernels=on_gpu, compiled=on_gpu and not in_pieces)


def estimate(config: Config, loop: Loop | None = None) -> Estimate | None:
    """Of the train job; None where the model's shape is not known here. The config must have passed the other checks."""
    counts = count(config.model.architecture, config.adapter) if config.model.architecture else None
    if counts is None:
        return None
    loop, part = loop or loop_of(config), config.cluster.train
    on_gpu = part.gpus_per_node != 0
    device = _device(config, counts, loop, on_gpu)
    host = _host(config, counts, loop)
    if not on_gpu:
        host = Host(host.loading, host.offload + part.ranks_per_node * device.total, host.processes)
    return Estimate(device, host, _disk(config, counts), on_gpu)


def _ranks(config: Config) -> tuple[int, int]:
    """(all ranks, ranks that share one copy of the training state)."""
    world = config.cluster.train.nodes * config.cluster.train.ranks_per_node
    return world, copy_ranks(config.parallel, world)


def _device(config: Config, counts: Counts, loop: Loop, on_gpu: bool) -> Device:
    layout = _zero if config.parallel.backend is Backend.zero else _fsdp
    state = layout(config, counts, loop)
    compute = {
        "activations": activation_bytes(config, fused_kernels=loop.fused_kernels, compiled=loop.compiled),
        "logits": logit_bytes(config, counts, loss=loop.loss, compiled=loop.fused_kernels),
    }
    if config.parallel.backend is Backend.fsdp and split(config, _ranks(config)[0])[1] == 1:
        # each block's gradients come as what it kept goes; micro batches that are added up find those of the ones before
        state["gradients"] = max(0, state["gradients"] - _going(config, loop))
    # embedding and head are reduced when the logits are gone, in blocks as large as theirs
    state["communication"] += max(0, state.pop("late") - compute["logits"])
    moving = state["gathered"] + state["communication"] + sum(compute.values())
    cast = counts.frozen or config.parallel.backend is Backend.zero  # before the model goes to the GPU
    return Device(
        **state,
        **compute,
        context=CONTEXT if on_gpu else 0,
        slack=SLACK * moving,
        loading=0 if loop.sliced_loading else counts.total * (width_of(config) if cast else 4),
    )


def _going(config: Config, loop: Loop) -> float:
    """Bytes of activations that are freed by the time the first block goes backward."""
    shape = replace(shape_of(config), num_hidden_layers=1)
    last = replace(config, model=replace(config.model, architecture=shape))
    whole, rest = (
        activation_bytes(each, fused_kernels=loop.fused_kernels, compiled=loop.compiled) for each in (config, last)
    )
    return whole - rest


def _fsdp(config: Config, counts: Counts, loop: Loop) -> dict[str, float]:
    """FSDP2: fp32 masters, gradients (`reduce_dtype` fp32) and two fp32 moments on shards; parameters gathered in `width`.

    Embedding and head stay gathered from forward to backward, and are reduced ("late") in one large piece each. Two blocks are
    gathered at once, a third lies in the buffer it is gathered into; two reductions of blocks overlap. What is frozen is not
    gathered where every rank has it whole.
    torch/distributed/fsdp/_fully_shard/{_fsdp_param_group,_fsdp_collectives}.py, 2.11 and 2.13.
    """
    width, (_, shard), tensor = width_of(config), _ranks(config), config.parallel.tensor_ranks
    trained, frozen = counts.trained / shard, frozen_bytes(config, counts, width, shard)
    unit, root = width * counts.trained_block / tensor, counts.root
    if counts.frozen and shard == 1:
        root = counts.trained_root
    elif counts.frozen:  # a quantised weight is gathered packed, and one at a time is unpacked
        unit += frozen_width(config, width) * counts.block
    unpacked = UNPACKED.get(config.adapter.base, width) * counts.largest if counts.frozen else 0
    blocks = (counts.total - counts.root) // counts.block
    kept = blocks if config.parallel.reshard_after_forward is False else 2
    here = 0 if config.parallel.offload_parameters else 1
    return {
        "parameters": here * (4 * trained + frozen),
        "gathered": width * root + unit * (min(kept, blocks) + (shard > tensor)) + unpacked,
        "gradients": here * 4 * trained,
        "optimizer": here * moment_bytes(config, counts) * trained,
        "communication": (width + 2 * 4) * counts.trained_block / tensor,
        "late": (width + 4) * counts.trained_root,
    }


def _zero(config: Config, counts: Counts, loop: Loop) -> dict[str, float]:
    """DeepSpeed ZeRO: a copy in `width` for compute (whole, or under stage 3 a shard), fp32 masters and moments on shards.

    During a step stage 3 also holds the gradients of a sub group, flat.
    deepspeed/runtime/zero/{stage_1_and_2,stage3}.py, 0.19.8, with the settings of conf/deepspeed.py.
    """
    parallel, width, (_, shard) = config.parallel, width_of(config), _ranks(config)
    trained, bucket = counts.trained / shard, parallel.bucket_elements
    reduced = max(min(bucket, counts.trained), 0 if counts.frozen else counts.largest)
    here = 0 if parallel.offload_optimizer else 1
    group = min(SUB_GROUP, trained) if parallel.zero_stage == 3 else trained
    optimizer = here * (moment_bytes(config, counts) * trained + (0 if loop.fused_optimizer else 4 * group))
    base = frozen_bytes(config, counts, width, shard if parallel.zero_stage == 3 else 1)
    if parallel.zero_stage < 3:
        gradients = width * (counts.trained + trained) if parallel.zero_stage == 1 else 0
        return {
            "parameters": width * counts.trained + base + here * 4 * trained,
            "gathered": 0,
            "gradients": gradients + here * 4 * trained,
            "optimizer": optimizer,
            "communication": 2 * width * bucket,
            "late": (width + 4) * reduced,  # gradients, and cast for NCCL
        }
    own = 0 if parallel.offload_parameters else width * trained + base
    return {
        "parameters": own + here * (4 * trained if width < 4 else 0),
        "gathered": width * min(counts.trained + counts.frozen, LIVE + 2 * bucket),
        "gradients": here * 4 * (trained + group),
        "optimizer": optimizer,
        "communication": 4 * bucket,
        "late": (width + 2 * 4) * reduced,  # gradients, cast, and flattened to be scattered
    }


def _host(config: Config, counts: Counts, loop: Loop) -> Host:
    """A node's. Without sliced loading every rank builds the whole model, the masters in fp32. With it there are only
    buffers; but experts, which transformers fuse while they are loaded, are one whole copy at a time."""
    ranks = config.cluster.train.ranks_per_node
    one = counts.total * (width_of(config) if counts.frozen else 4)
    copies = ranks if not loop.sliced_loading else 1 if experts(shape_of(config)) else 0
    return Host(
        loading=copies * one + ranks * READING * loop.sliced_loading,
        offload=ranks * (_offload(config, counts) + offloaded_bytes(config)),
        processes=ranks * PROCESS,
    )


def _offload(config: Config, counts: Counts) -> float:
    """Host bytes of one rank's offloaded state. torch rounds each pinned allocation up to a power of two: counted for
    ZeRO's flat buffers, left out for FSDP's many small ones."""
    parallel, width, (_, shard) = config.parallel, width_of(config), _ranks(config)
    trained, frozen = counts.trained / shard, counts.frozen / shard
    if parallel.backend is Backend.fsdp:
        return (4 + 4 + 8) * trained + width * frozen if parallel.offload_parameters else 0
    found = 0.0
    if parallel.offload_optimizer:
        flat = 3 if parallel.zero_stage == 3 else 2  # masters, gradients of the step; stage 3 also those it accumulates
        found += flat * _pinned(4 * trained) + (8 + 4) * trained + (0 if flat == 3 else 2 * _pinned(width * trained))
    if parallel.offload_parameters:
        found += _pinned(width * trained) + width * frozen
    return found


def _pinned(size: float) -> float:
    return float(1 << max(0, int(size) - 1).bit_length())


def _disk(config: Config, counts: Counts) -> Disk:
    """Stages 1 and 2 of ZeRO also write the whole model in the precision of compute, once (full fine-tunes)."""
    zero = config.parallel.backend is Backend.zero and config.parallel.zero_stage < 3
    one = (4.0 + moment_bytes(config, counts)) * counts.trained + (width_of(config) * counts.trained if zero else 0)
    chosen = {OutputDtype.auto: width_of(config), OutputDtype.fp32: 4}.get(config.consolidate.dtype, 2)
    merged = chosen * counts.total if "consolidate" in config.jobs else 0
    return Disk(one, one * (config.train.keep_checkpoints + 1), merged)
