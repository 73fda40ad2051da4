"""torch FSDP2 on a (replicate, shard, tensor) mesh: plain data parallelism, full sharding, or sharding inside groups of ranks,
each with whole matrices or with slices of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from conf.choices import Precision
from conf.errors import Problem, RunError
from conf.schema import Config
from jobs.backends import Engine, grad_clip, tensor_parallel
from jobs.backends.host_staging import Stager
from jobs.distributed.process_group import World
from jobs.model import float8_training, materialize, prepare, unwrap
from jobs.model.build import blocks, build_on_meta, compute_dtype
from jobs.tensor_io.slices import Part, plain
from jobs.training import loss_scaling
from jobs.training import optimizer as optim

NAMES = ("replicate", "shard", tensor_parallel.NAME)
TRAINABLE = StateDictOptions(ignore_frozen_params=True)
"""An adapter's checkpoint holds no base weights."""


def wrap(model: nn.Module, config: Config, world: World, resumed: bool = False) -> Engine:
    """Shard each block, then what is left, over the mesh; masters stay fp32, compute is in the config's precision.

    A model without weights gets them once it is sharded; `resumed` leaves out what a checkpoint is going to overwrite.
    """
    cut, apart = world.tensor_ranks, world.size // world.tensor_ranks
    shard = config.parallel.shard_ranks or apart
    whole = init_device_mesh(world.device.type, (apart // shard, shard, cut), mesh_dim_names=NAMES)
    mesh = whole["replicate", "shard"] if shard < apart else whole["shard"]
    dtype = compute_dtype(config)
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype is not torch.float32
        else MixedPrecisionPolicy()
    )
    offload = (
        CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        if config.parallel.offload_parameters
        else OffloadPolicy()
    )
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": offload,
    }
    parts = tensor_parallel.slice_matrices(model, whole[tensor_parallel.NAME]) if cut > 1 else []
    float8_training.convert_linears(model, config, world)
    prepare.prepare_model(model, config, world)
    if not materialize.is_empty(model):
        model.to(world.device)
    if shard == 1:  # whole on every rank, and never changed: FSDP would copy it in every step
        options["ignored_params"] = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    again = config.parallel.reshard_after_forward is not False
    for block in blocks(model):
        if shard > 1:
            _shard_adapters(block, reshard_after_forward=again, **options)
        fully_shard(block, reshard_after_forward=again, **options)
    for module in (*_outer(model), model):  # backward begins where their forward ends, or needs no weight
        fully_shard(module, reshard_after_forward=False, **options)
    read = 0
    if materialize.is_empty(model):
        home = torch.device("cpu") if config.parallel.offload_parameters else world.device
        materialize.materialize(model, lambda parameter: torch.empty_like(parameter, device=home), world.device)
        with tensor_parallel.columns() as held:
            read = materialize.fill(model, build_on_meta, materialize.local_parts(model, held), config, world, resumed)
    model.train()
    optimizer = optim.build(model, config)
    if config.train.precision is Precision.fp16:
        loss_scaling.install(optimizer)
    return Engine(
        model,
        optimizer,
        config.train.max_grad_norm,
        read,
        lambda trained, limit: grad_clip.clip(trained, limit, parts, whole[tensor_parallel.NAME]),
    )


def _outer(model: nn.Module) -> list[nn.Module]:
    """Embedding and output head, each a group of its own, so that the head's gradient is reduced while blocks go backward, and
    the embedding's is all that is left in the end. Not where they are one weight, nor where nothing of them is trained.
    """
    inside = unwrap.causal_lm(model)
    found = [inside.get_input_embeddings(), inside.get_output_embeddings()]
    weights = [parameter for module in found if module is not None for parameter in module.parameters()]
    apart = len(weights) == len(set(weights)) == sum(parameter.requires_grad for parameter in weights)
    return found if apart and all(found) else []


def _shard_adapters(block: nn.Module, **options: Any) -> None:
    """Where some of a block is frozen, shard the rest as a group of its own: torch 2.11 gathers wrong values where dtypes differ
    in one. It is gathered around the block, as all else of it is: hooks of layers inside would cut the compiled block to pieces.
    """
    if all(parameter.requires_grad for parameter in block.parameters()):
        return
    adapters = [module for module in block.modules() if any(item.requires_grad for item in module.parameters(False))]
    if not adapters:
        return
    fully_shard(adapters, **options)
    state = fully_shard.state(adapters[0])  # type: ignore[attr-defined]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    block.register_forward_hook(state._post_forward)


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> None:
    """Accumulate sharded gradients; only the last micro batch is averaged between replicas."""
    assert isinstance(engine.module, FSDPModule)
    engine.module.set_requires_all_reduce(last)
    engine.module.set_is_last_backward(last)
    (loss * loss_scaling.scale(engine.optimizer)).backward()


def step(engine: Engine, learning_rate: float) -> float:
    """0 where fp16 overflowed: that step is left out, and the next one has a smaller loss scale."""
    loss_scaling.unscale(engine.optimizer)
    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    assert engine.clip is not None
    norm = engine.clip(trainable, engine.max_grad_norm)
    optim.set_learning_rate(engine.optimizer, learning_rate)
    taken = loss_scaling.update(engine.optimizer, norm)
    if taken:
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    return float(norm) if taken else 0.0


def save(engine: Engine, folder: Path) -> None:
    dcp.save(_state(engine)[0], checkpoint_id=folder)


def storages(engine: Engine) -> list[int]:
    """Bytes of each storage that `staged` copies; none where a first step in fp16 overflowed: asked for it, torch would take
    a step to make optimizer state."""
    if not engine.optimizer.state:
        return []
    tensors = [value for part in _state(engine)[0].values() for value in _tensors(part)]
    held = {value.untyped_storage()._cdata: value.untyped_storage().size() for value in tensors}
    return list(held.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """On this rank, in dictionaries of them."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, torch.Tensor):
        yield value._local_tensor if isinstance(value, DTensor) else value


def staged(engine: Engine, folder: Path, stager: Stager, group: ProcessGroup) -> Callable[[], object]:
    """As torch's own async_save does; but what follows a write, its sums, is done in the background too."""
    state = stager.state(_state(engine)[0])
    return lambda: dcp.save(state, checkpoint_id=folder, process_group=group)


def load(engine: Engine, folder: Path) -> None:
    state, groups = _state(engine)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        engine.module,
        engine.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"] | groups,
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    loss_scaling.restore(engine.optimizer, state.get("scaling", {}))


def _state(engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds, and the optimizer's groups apart: those are the config's, and differ between layouts."""
    model, optimizer = get_state_dict(engine.module, engine.optimizer, options=TRAINABLE)
    state = {"model": model, "optimizer": {"state": optimizer["state"]}}
    if scaled := loss_scaling.state(engine.optimizer):
        state["scaling"] = scaled
    return state, {"param_groups": optimizer["param_groups"]}


def held(engine: Engine) -> dict[str, dict[str, Part]]:
    get_optimizer_state_dict(engine.module, engine.optimizer, options=TRAINABLE)  # makes the state where there is none
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state = engine.optimizer.state[parameter]
            found[plain(name)] = {"weight": _part(parameter)} | {kind: _part(value) for kind, value in state.items()}
    return found


def _part(value: torch.Tensor) -> Part:
    """A tensor sharded like its parameter, or a scalar that all ranks hold."""
    if isinstance(value, DTensor) and tensor_parallel.NAME in (value.device_mesh.mesh_dim_names or ()):
        said = "cannot take up what another backend wrote: resume with 1, save there, and go on with more"
        raise RunError(Problem("parallel.tensor_ranks", value.device_mesh[tensor_parallel.NAME].size(), said))
    shape, begin, local = tensor_parallel.rows(value) if isinstance(value, DTensor) else (value.shape, 0, value)
    return Part(tuple(shape), begin, local.detach().view(-1), trained=True)


def filled(engine: Engine) -> None:
    """Nothing to do: the shards are the masters."""


def weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield name, whole.detach().float().cpu()
