"""The backend of torch FSDP2: DDP, full sharding or hybrid sharding (HSDP), each also with tensor parallelism.

All of them are one (replicate, shard, tensor) mesh with other sizes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_torch_wrappers, without_wrappers
from jobs.training import loss_scaling
from jobs.training import optimizer as optim

MESH_DIMS = ("replicate", "shard", tensor_parallel.MESH_DIM)
TRAINABLE = StateDictOptions(ignore_frozen_params=True)
"""Of an adapter's model only trainable weights are saved. Of any other model all are: some families freeze a few weights."""


def wrap(model: nn.Module, config: Config, world: World, resumed: bool = False) -> Engine:
    """Shard `model`, load its weights if it has none, and make its optimizer. Master weights stay fp32."""
    mesh = build_mesh(config, world)
    tensor_mesh = mesh[tensor_parallel.MESH_DIM]
    # The order matters: matrices are sliced and linear layers replaced while the model has no weights, before it is sharded
    partial_gradients = tensor_parallel.slice_matrices(model, tensor_mesh) if tensor_mesh.size() > 1 else []
    float8_training.convert_linears(model, config, world)
    prepare.prepare_model(model, config, world)
    if not materialize.is_empty(model):
        model.to(world.device)
    shard(model, config, world, mesh)
    read_bytes = load_weights(model, config, world, resumed) if materialize.is_empty(model) else 0
    model.train()
    return Engine(
        model,
        make_optimizer(model, config),
        config.train.max_grad_norm,
        read_bytes,
        lambda trained, limit: grad_clip.clip(trained, limit, partial_gradients, tensor_mesh),
    )


def build_mesh(config: Config, world: World) -> DeviceMesh:
    """The mesh of all ranks, with the dimensions MESH_DIMS. Tensor ranks are neighbors, then come the ranks of a shard group."""
    groups = world.size // world.tensor_ranks
    shard_ranks = config.parallel.shard_ranks or groups
    sizes = (groups // shard_ranks, shard_ranks, world.tensor_ranks)
    return init_device_mesh(world.device.type, sizes, mesh_dim_names=MESH_DIMS)


def shard(model: nn.Module, config: Config, world: World, mesh: DeviceMesh) -> None:
    """Apply `fully_shard` to each block, to embedding and output head, and to the rest, in place."""
    replicas, shard_ranks = mesh["replicate"].size(), mesh["shard"].size()
    dtype = compute_dtype(config)
    options: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if replicas > 1 else mesh["shard"],
        "mp_policy": (
            MixedPrecisionPolicy()
            if dtype is torch.float32
            else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        ),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            if config.parallel.offload_parameters
            else OffloadPolicy()
        ),
    }
    if shard_ranks == 1:
        # Frozen weights are whole on every rank and never change, but FSDP would copy them in every step
        options["ignored_params"] = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    reshard = config.parallel.reshard_after_forward is not False
    all_blocks = blocks(model)  # FSDP changes their classes
    for block in _without_shared_weights(all_blocks):
        if shard_ranks > 1:
            _shard_adapters(block, list(block.modules()), reshard_after_forward=reshard, **options)
        fully_shard(block, reshard_after_forward=reshard, **options)
    if shard_ranks > 1:  # adapters of embedding and output head, or trained copies of them
        in_blocks = {module for block in all_blocks for module in block.modules()}
        outside = [module for module in model.modules() if module not in in_blocks]
        _shard_adapters(model, outside, reshard_after_forward=False, **options)
    # Never resharded after forward: backward starts with these modules, or does not need their weights
    for module in (*_embedding_and_head(model), model):
        fully_shard(module, reshard_after_forward=False, **options)


def load_weights(model: nn.Module, config: Config, world: World, resumed: bool) -> int:
    """Allocate the shards of a model on the meta device and fill them; returns the bytes that this rank read.

    `resumed`: do not read what a checkpoint will overwrite.
    """
    device = torch.device("cpu") if config.parallel.offload_parameters else world.device
    materialize.materialize(model, lambda parameter: torch.empty_like(parameter, device=device), world.device)
    with tensor_parallel.whole_rows_for_loading() as local_rows:
        parts = materialize.local_parts(model, local_rows)
        return materialize.fill(model, build_on_meta, parts, config, world, resumed)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The config's optimizer over the trainable parameters, with a loss scale if training is in fp16."""
    optimizer: torch.optim.Optimizer = optim.build(model, config)
    if config.train.precision is Precision.fp16:
        loss_scaling.install(optimizer)
    return optimizer


def _embedding_and_head(model: nn.Module) -> list[nn.Module]:
    """The embedding and the output head, if each can be an FSDP group of its own; else an empty list.

    Then the head's gradient is reduced during the backward of the blocks, and only the embedding's is left at the end. They stay in
    the root group if they share a weight (tied embeddings), or if one of their weights is frozen.
    """
    causal_lm = unwrap.causal_lm(model)
    modules = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    weights = [parameter for module in modules if module is not None for parameter in module.parameters()]
    separate = len(weights) == len(set(weights)) == sum(parameter.requires_grad for parameter in weights)
    return modules if separate and all(modules) else []


def _without_shared_weights(decoder_blocks: list[nn.Module]) -> list[nn.Module]:
    """The blocks that share no weight with another block: a weight can be in one FSDP group only.

    The others stay in the root group.
    """
    users = Counter(weight for block in decoder_blocks for weight in set(block.parameters()))
    return [block for block in decoder_blocks if all(users[weight] == 1 for weight in block.parameters())]


def _shard_adapters(block: nn.Module, modules: list[nn.Module], **options: Any) -> None:
    """If a part of `block` is frozen, make the trainable ones (adapters) of `modules` an FSDP group of their own.

    torch 2.11 gathers wrong values for a group with several dtypes. The adapters' weights are gathered by hooks on the block, like
    its other weights: hooks on layers inside would split the compiled block into many parts.
    """
    if all(parameter.requires_grad for parameter in block.parameters()):
        return
    adapters = [module for module in modules if any(item.requires_grad for item in module.parameters(False))]
    if not adapters:
        return
    fully_shard(adapters, **options)
    state = fully_shard.state(adapters[0])  # type: ignore[attr-defined]  # set by FSDP's decorator
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    block.register_forward_hook(state._post_forward)


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> None:
    """See `Backend.backward`. Gradients are reduced over the shards each time, over the replicas only with the last micro batch."""
    assert isinstance(engine.module, FSDPModule)
    engine.module.set_requires_all_reduce(last)
    engine.module.set_is_last_backward(last)
    (loss * loss_scaling.scale(engine.optimizer)).backward()


def step(engine: Engine, learning_rate: float) -> float:
    """See `Backend.step`. Returns 0 if fp16 overflowed: then the weights stay, and the next step has a smaller loss scale."""
    loss_scaling.unscale(engine.optimizer)
    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    assert engine.clip is not None
    norm = engine.clip(trainable, engine.max_grad_norm)
    optim.set_learning_rate(engine.optimizer, learning_rate)
    finite = loss_scaling.update(engine.optimizer, norm)
    if finite:
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    return float(norm) if finite else 0.0


def save(engine: Engine, folder: Path) -> None:
    """See `Backend.save`."""
    dcp.save(_state_to_save(engine), checkpoint_id=folder)


def storage_bytes(engine: Engine) -> list[int]:
    """See `Backend.storage_bytes`. Empty if the first fp16 step overflowed: there is no optimizer state yet, and torch would take
    a step to make it.
    """
    if not engine.optimizer.state:
        return []
    tensors = [value for part in _state_to_save(engine).values() for value in _tensors(part)]
    sizes = {value.untyped_storage()._cdata: value.untyped_storage().size() for value in tensors}
    return list(sizes.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dictionaries. A DTensor gives this rank's part."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, torch.Tensor):
        yield value._local_tensor if isinstance(value, DTensor) else value


def stage(engine: Engine, folder: Path, stager: Stager, group: ProcessGroup) -> Callable[[], object]:
    """See `Backend.stage`. Like torch's async_save, but its caller can also compute checksums in the background after the write."""
    state = stager.copy_state_dict(_state_to_save(engine))
    return lambda: dcp.save(state, checkpoint_id=folder, process_group=group)


def load(engine: Engine, folder: Path) -> None:
    """See `Backend.load`."""
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
    """(state to save, param_groups). The groups are not saved: they come from the config and differ between layouts."""
    model, optimizer = get_state_dict(engine.module, engine.optimizer, options=TRAINABLE)
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # torch leaves a frozen weight in under the second of its tied names
            model.pop(without_torch_wrappers(name), None)
    state = {"model": model, "optimizer": {"state": optimizer["state"]}}
    if scaled := loss_scaling.state(engine.optimizer):
        state["scaling"] = scaled
    return state, {"param_groups": optimizer["param_groups"]}


def _state_to_save(engine: Engine) -> dict[str, Any]:
    """The state with the weights that the model itself freezes, which a merge needs too."""
    state = _state(engine)[0]
    has_adapter = hasattr(engine.module, "peft_config")
    return state if has_adapter else state | {"model": get_model_state_dict(engine.module)}


def local_state(engine: Engine) -> dict[str, dict[str, TensorPart]]:
    """See `Backend.local_state`."""
    get_optimizer_state_dict(engine.module, engine.optimizer, options=TRAINABLE)  # makes missing state
    state_of_rank = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state = engine.optimizer.state[parameter]
            state_of_rank[without_wrappers(name)] = {"weight": _part(parameter)} | {
                kind: _part(value) for kind, value in state.items()
            }
    return state_of_rank


def _part(value: torch.Tensor) -> TensorPart:
    """This rank's part of a tensor that is sharded like its parameter, or the whole of a scalar, which every rank has."""
    if isinstance(value, DTensor) and tensor_parallel.MESH_DIM in (value.device_mesh.mesh_dim_names or ()):
        message = "cannot load a checkpoint of another backend: resume with parallel.tensor_ranks=1, save, then resume with more"
        raise RunError(Problem("parallel.tensor_ranks", value.device_mesh[tensor_parallel.MESH_DIM].size(), message))
    shape, begin, local = tensor_parallel.rows(value) if isinstance(value, DTensor) else (value.shape, 0, value)
    return TensorPart(tuple(shape), begin, local.detach().view(-1), trained=True)


def apply_local_state(engine: Engine) -> None:
    """Nothing to do: FSDP computes from the master shards themselves."""


def weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """See `Backend.weights`."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield name, whole.detach().float().cpu()
