"""Estimates memory in bytes per GPU, per node and on disk for a Config, before anything is queued; pure.

The formulas follow what jobs/backends does. tests/launcher/estimate/test_memory.py and docs/memory.md compare them with
measured runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from conf.batch import split
from conf.choices import AdapterKind, Backend, Frozen, OutputDtype
from conf.deepspeed import PERSISTENT, zero_section
from conf.mesh import copy_ranks
from conf.schema import Config
from launcher.estimate.activations import Loss, activation_bytes, logit_bytes, offloaded_bytes, shape_of, width_of
from launcher.estimate.blocks import kinds
from launcher.estimate.bytes_per_weight import frozen_bytes, frozen_width, moment_bytes
from launcher.estimate.parameters import Counts, count
from launcher.estimate.table import GIB, Device, Disk, Estimate, Host

CONTEXT = 1.5 * GIB
"""GPU memory outside torch's allocator: about 0.5 GiB for CUDA context and modules, about 1 GiB for NCCL with 8 peers."""
PROCESS = 3 * GIB
"""Host memory of a rank besides its weights: Python, torch, CUDA libraries. Rows are mapped from disk and not counted."""
READING = 4 * 2**24
"""Bytes of the host buffers of a rank that reads its slices of the weights (jobs/tensor_io/slices.py)."""
SLACK = 0.05
"""Share of temporary memory that the caching allocator loses to fragmentation; from the measured runs."""
DEQUANTIZED_BYTES = {Frozen.full: 0, Frozen.float8: 1}
"""Bytes per weight of the copy of a frozen weight made for its matrix product. Bases that are not in here (nf4, int8) are
dequantized to the compute precision."""
MATRICES = 10
"""Most matrices of a dense block: with a larger threshold, each counts as whole on every rank up to that size."""


@dataclass(frozen=True)
class Loop:
    """Properties of the training loop that no config key holds. The defaults are what jobs/ does."""

    loss: Loss = Loss.fused
    fused_kernels: bool = False
    """Norms and SwiGLU save only their inputs: with Liger's kernels, or compiled by torch.compile (the whole block, or only
    these parts)."""
    compiled: bool = False
    """Whole blocks are compiled."""
    fused_optimizer: bool = True
    """AdamW runs as one kernel, which jobs/training/optimizer.py asks for if the weights are on a GPU. Otherwise ZeRO's step
    holds one more fp32 tensor."""
    sliced_loading: bool = True
    """Every rank reads only its own slices of the weights. Otherwise each rank builds the whole model, then shards it."""


def loop_of(config: Config) -> Loop:
    """How jobs/ will train: compiled as jobs/model/prepare.py decides. torch's GPU build includes triton."""
    if config.train.compile is not None:
        return Loop(fused_kernels=config.train.compile, compiled=config.train.compile)
    stage_3 = config.parallel.backend is Backend.zero and config.parallel.zero_stage == 3
    on_gpu = config.cluster.train.gpus_per_node != 0
    # hooks of adapters under ZeRO-3 break the graph inside a block: there only norms and SwiGLU are compiled
    parts_only = stage_3 and config.adapter.kind is not AdapterKind.none
    return Loop(fused_kernels=on_gpu, compiled=on_gpu and not parts_only)


def estimate(config: Config, loop: Loop | None = None) -> Estimate | None:
    """The memory of the train job. None where `parameters.why_not_counted` says why.

    The config must have passed the other checks.
    """
    counts = count(config.model.architecture, config.adapter) if config.model.architecture else None
    if counts is None:
        return None
    loop, train = loop or loop_of(config), config.cluster.train
    on_gpu = train.gpus_per_node != 0
    device = _device(config, counts, loop, on_gpu)
    host = _host(config, counts, loop)
    if not on_gpu:
        host = Host(host.loading, host.offload + train.ranks_per_node * device.total, host.processes)
    return Estimate(device, host, _disk(config, counts), on_gpu)


def _ranks(config: Config) -> tuple[int, int]:
    """(all ranks, ranks that together hold one copy of the training state)."""
    world = config.cluster.train.ranks
    return world, copy_ranks(config.parallel, world)


def _device(config: Config, counts: Counts, loop: Loop, on_gpu: bool) -> Device:
    layout = _zero if config.parallel.backend is Backend.zero else _fsdp
    state = layout(config, counts, loop)
    compute = {
        "activations": activation_bytes(config, fused_kernels=loop.fused_kernels, compiled=loop.compiled),
        "logits": logit_bytes(config, counts, loss=loop.loss, compiled=loop.fused_kernels),
    }
    if config.parallel.backend is Backend.fsdp and split(config, _ranks(config)[0])[1] == 1:
        # FSDP makes a block's gradients while it frees that block's activations. With gradient accumulation the gradients
        # of earlier micro batches are there from the start, so they count in full.
        state["gradients"] = max(0, state["gradients"] - _freed_in_backward(config, loop))
    # Embedding and head are reduced after the logits are freed: count only what exceeds the logits.
    state["communication"] += max(0, state.pop("root_reduction") - compute["logits"])
    temporary = state["gathered"] + state["communication"] + sum(compute.values())
    # both cast the model before it goes to the GPU
    cast = counts.frozen or config.parallel.backend is Backend.zero
    return Device(
        **state,
        **compute,
        context=CONTEXT if on_gpu else 0,
        slack=SLACK * temporary,
        loading=0 if loop.sliced_loading else counts.total * (width_of(config) if cast else 4),
    )


def _freed_in_backward(config: Config, loop: Loop) -> float:
    """Bytes of activations that are freed before the first block runs backward."""
    one_layer = replace(shape_of(config), num_hidden_layers=1)
    one_block = replace(config, model=replace(config.model, architecture=one_layer))
    whole, rest = (
        activation_bytes(each, fused_kernels=loop.fused_kernels, compiled=loop.compiled) for each in (config, one_block)
    )
    return whole - rest


def _fsdp(config: Config, counts: Counts, loop: Loop) -> dict[str, float]:
    """FSDP2: fp32 master weights, fp32 gradients (`reduce_dtype`) and optimizer state, all sharded.

    - Parameters are gathered in the compute precision. Two blocks are gathered at the same time; a third is in the buffer
      that all-gather writes to.
    - Embedding and head stay gathered from forward to backward. Each is reduced as one large tensor ("root_reduction").
    - Gradient reductions of two blocks overlap.
    - Frozen weights are not gathered if every rank holds all of them.

    Source: torch/distributed/fsdp/_fully_shard/{_fsdp_param_group,_fsdp_collectives}.py, torch 2.11 and 2.13.
    """
    width, (_, shard), tensor = width_of(config), _ranks(config), config.parallel.tensor_ranks
    trained, frozen = counts.trained / shard, frozen_bytes(config, counts, width, shard)
    block, root = width * counts.trained_block / tensor, counts.root
    if counts.frozen and shard == 1:
        root = counts.trained_root
    elif counts.frozen:  # a quantized weight is gathered quantized; one weight at a time is dequantized
        block += frozen_width(config, width) * counts.block
    dequantized = DEQUANTIZED_BYTES.get(config.adapter.base, width) * counts.largest if counts.frozen else 0
    blocks = (counts.total - counts.root) // counts.block
    kept = blocks if config.parallel.reshard_after_forward is False else 2
    on_device = 0 if config.parallel.offload_parameters else 1
    return {
        "parameters": on_device * (4 * trained + frozen),
        "gathered": width * root + block * (min(kept, blocks) + (shard > tensor)) + dequantized,
        "gradients": on_device * 4 * trained,
        "optimizer": on_device * moment_bytes(config, counts) * trained,
        "communication": (width + 2 * 4) * counts.trained_block / tensor,
        "root_reduction": (width + 4) * counts.trained_root,
    }


def _zero(config: Config, counts: Counts, loop: Loop) -> dict[str, float]:
    """DeepSpeed ZeRO: a copy of the weights in the compute precision, and sharded fp32 master weights and optimizer state.

    Under stages 1 and 2 the copy is whole, under stage 3 it is sharded. During a step, stage 3 also holds the gradients of
    one sub-group as a flat fp32 tensor.

    Source: deepspeed/runtime/zero/{stage_1_and_2,stage3}.py, 0.19.8, with the settings of conf/deepspeed.py.
    """
    parallel, width, (_, shard) = config.parallel, width_of(config), _ranks(config)
    trained, settings = counts.trained / shard, zero_section(config)
    bucket, fetched = settings["reduce_bucket_size"], settings.get("stage3_prefetch_bucket_size", 0)
    reduced = max(min(bucket, counts.trained), 0 if counts.frozen else counts.largest)
    on_device = 0 if parallel.offload_optimizer else 1
    group = min(settings["sub_group_size"], trained) if parallel.zero_stage == 3 else trained
    optimizer = on_device * (moment_bytes(config, counts) * trained + (0 if loop.fused_optimizer else 4 * group))
    base = frozen_bytes(config, counts, width, shard if parallel.zero_stage == 3 else 1)
    if parallel.zero_stage < 3:
        gradients = width * (counts.trained + trained) if parallel.zero_stage == 1 else 0
        return {
            "parameters": width * counts.trained + base + on_device * 4 * trained,
            "gathered": 0,
            "gradients": gradients + on_device * 4 * trained,
            "optimizer": optimizer,
            "communication": width * (bucket + settings["allgather_bucket_size"]),
            "root_reduction": (width + 4) * reduced,  # gradients, and their fp32 copy for NCCL
        }
    own = 0 if parallel.offload_parameters else width * trained + base
    return {
        "parameters": own + on_device * (4 * trained if width < 4 else 0),
        "gathered": width * min(counts.trained + counts.frozen, settings["stage3_max_live_parameters"] + 2 * fetched)
        + width * _persistent(counts, settings),
        "gradients": on_device * 4 * (trained + group),
        "optimizer": optimizer,
        "communication": 4 * bucket,
        "root_reduction": (width + 2 * 4)
        * reduced,  # gradients, their fp32 copy, and that flattened for reduce-scatter
    }


def _persistent(counts: Counts, settings: Mapping[str, Any]) -> float:
    """Elements that ZeRO-3 keeps whole on every rank, because a user has raised the threshold above that of Muster."""
    threshold = settings["stage3_param_persistence_threshold"]
    if threshold <= PERSISTENT:
        return 0
    whole = counts.total if threshold > counts.largest else MATRICES * threshold * (counts.total // counts.block)
    return float(min(whole, counts.total, settings.get("stage3_model_persistence_threshold", counts.total)))


def _host(config: Config, counts: Counts, loop: Loop) -> Host:
    """Host memory of one node.

    Without sliced loading every rank builds the whole model, with fp32 master weights. With it there are only buffers, except
    for mixture-of-experts models: transformers fuses experts while it loads them, which takes one whole copy at a time.
    """
    ranks = config.cluster.train.ranks_per_node
    model = counts.total * (width_of(config) if counts.frozen else 4)
    copies = (
        ranks if not loop.sliced_loading else 1 if any(block.experts for block, _ in kinds(shape_of(config))) else 0
    )
    return Host(
        loading=copies * model + ranks * READING * loop.sliced_loading,
        offload=ranks * (_offload(config, counts) + offloaded_bytes(config)),
        processes=ranks * PROCESS,
    )


def _offload(config: Config, counts: Counts) -> float:
    """Host bytes of one rank's offloaded state.

    torch rounds each pinned allocation up to a power of two. That is counted for ZeRO's large flat buffers, and left out for
    the many small ones of FSDP.
    """
    parallel, width, (_, shard) = config.parallel, width_of(config), _ranks(config)
    trained, frozen = counts.trained / shard, counts.frozen / shard
    if parallel.backend is Backend.fsdp:
        return (4 + 4 + 8) * trained + width * frozen if parallel.offload_parameters else 0
    total = 0.0
    if parallel.offload_optimizer:
        stage_3 = parallel.zero_stage == 3
        flat = 3 if stage_3 else 2  # master weights and gradients of the step; stage 3 also accumulated gradients
        total += flat * _pinned(4 * trained) + (8 + 4) * trained + (0 if stage_3 else 2 * _pinned(width * trained))
    if parallel.offload_parameters:
        total += _pinned(width * trained) + width * frozen
    return total


def _pinned(size: float) -> float:
    """`size` bytes rounded up to a power of two."""
    return float(1 << max(0, int(size) - 1).bit_length())


def _disk(config: Config, counts: Counts) -> Disk:
    """Disk space in the run folder. Stages 1 and 2 of ZeRO also write all trained weights once in the compute precision."""
    whole_copy = config.parallel.backend is Backend.zero and config.parallel.zero_stage < 3
    checkpoint = (4.0 + moment_bytes(config, counts)) * counts.trained
    checkpoint += width_of(config) * counts.trained if whole_copy else 0
    bytes_out = {OutputDtype.auto: width_of(config), OutputDtype.fp32: 4}.get(config.consolidate.dtype, 2)
    towers = GIB * config.model.architecture.tower_gib if config.model.architecture else 0
    merged = bytes_out * counts.total + towers if "consolidate" in config.jobs else 0
    return Disk(checkpoint, checkpoint * (config.train.keep_checkpoints + 1), merged)
