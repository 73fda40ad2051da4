"""The backend of DeepSpeed ZeRO-1, 2 and 3, through `deepspeed.initialize`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from conf import deepspeed as deepspeed_settings
from conf.choices import AdapterKind, Checkpointing
from conf.errors import ConfigError, Problem
from conf.families import NOT_UNDER_ZERO_3
from conf.schema import Config
from jobs.backends import Engine, zero_partitions
from jobs.backends.host_staging import Stager, collect_storages
from jobs.distributed.process_group import World
from jobs.model import compile, materialize, prepare
from jobs.model.build import blocks, build_on_meta, compute_dtype
from jobs.model.expert_modules import expert_modules
from jobs.tensor_io.slices import TensorPart
from jobs.training import optimizer as optim

TAG = "zero"
"""DeepSpeed's tag: the name of its folder inside a checkpoint. Muster's own folder has the step in its name."""


def wrap(model: nn.Module, config: Config, world: World, resumed: bool = False) -> Engine:
    """Pass the model to DeepSpeed. A model without weights gets them before that; with ZeRO-3, after it is partitioned."""
    init_deepspeed(world)
    import deepspeed

    prepare.prepare_model(model, config, world)
    if config.parallel.zero_stage == 3 and (whole := _gathered_whole(model, config, world)):
        deepspeed.utils.set_z3_leaf_modules(model, list(whole))
    read_bytes = 0
    if materialize.is_empty(model):
        allocate = _allocate_partitions if config.parallel.zero_stage == 3 else _allocate_whole
        read_bytes = materialize.fill(model, build_on_meta, allocate(model, config, world), config, world, resumed)
    model.train()  # DeepSpeed casts the parameters; buffers (rotary frequencies) must stay fp32
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=optim.build(model, config),
        config=deepspeed_settings.deepspeed_config(config, world.size),
    )
    engine.adapter_only = config.adapter.kind is not AdapterKind.none
    if config.parallel.zero_stage == 3 and config.train.activation_checkpointing is Checkpointing.selective:
        _hide_gathering(optimizer.parameter_offload)
    return Engine(engine, optimizer, config.train.max_grad_norm, read_bytes)


def _gathered_whole(model: nn.Module, config: Config, world: World) -> set[type[nn.Module]]:
    """Classes of modules whose weights ZeRO-3 gathers together, before their forward (DeepSpeed calls them leaf modules)."""
    if compile.gathers_whole_blocks(config, world):
        # hooks inside a block would split its compiled code into dozens of parts
        return {type(block) for block in blocks(model)}
    # Each call of a module gathers its weights, and all ranks must take part. Ranks call as many experts as their tokens need.
    experts = expert_modules(model)
    adapters = config.adapter.kind is not AdapterKind.none
    if adapters and any(weight.requires_grad for module in experts for weight in module.parameters()):
        # DeepSpeed 0.19.8 uses such a weight in backward when it has already partitioned it again
        raise ConfigError(Problem("adapter.targets", config.adapter.targets, NOT_UNDER_ZERO_3))
    return {type(module) for module in experts}


def init_deepspeed(world: World) -> None:
    """Initialize DeepSpeed with the process group and the device of this rank. Call it before any other DeepSpeed function."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else DeepSpeed guesses and logs a warning
    # DeepSpeed selects the GPU with this number. A rank that sees only its own GPU has number 0
    if world.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(world.device.index)
    import deepspeed

    # Do not build this kernel. Gloo does not need it, building takes 20 s, and a rank that is killed meanwhile leaves a lock:
    # all later ranks wait for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def _hide_gathering(offload: Any) -> None:
    """Hide from selective recomputation how ZeRO-3 gathers and frees weights around the modules inside a block.

    In the recomputation other weights are gathered than in forward, and torch 2.13 refuses operators that forward did not have.
    """

    def hidden(hook: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def call(module: nn.Module) -> None:
            with _disable_current_modes():
                hook(module)

        return call

    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, hidden(getattr(offload, name)))


def _allocate_whole(model: nn.Module, config: Config, world: World) -> dict[str, TensorPart]:
    """Allocate every parameter whole on every rank, in the compute precision; DeepSpeed makes its master weights from them."""
    dtype = compute_dtype(config)
    materialize.materialize(model, lambda item: torch.empty_like(item, dtype=dtype, device=world.device), world.device)
    return materialize.local_parts(model, lambda item: (item.shape, 0, item))


def _allocate_partitions(model: nn.Module, config: Config, world: World) -> dict[str, TensorPart]:
    """Allocate this rank's partition of every parameter: contiguous elements, padded to the same length on all ranks.

    `zero.Init` as a context would make each parameter whole on every rank and broadcast it. Its parts, called here, make empty
    partitions.
    """
    import deepspeed

    dtype, context = (
        compute_dtype(config),
        deepspeed.zero.Init(config_dict_or_path=deepspeed_settings.deepspeed_config(config, world.size)),
    )
    if context.mem_efficient_linear and not compile.gathers_whole_blocks(config, world):
        # Without it, every linear layer keeps its gathered weight until its backward. Compiled blocks do not keep it, and with it
        # would be compiled again for each block, because it reads a weight's id (torch 2.11).
        context._enable_mem_efficient_linear()

    def partition(parameter: nn.Parameter) -> Any:
        partitioned: Any = nn.Parameter(
            torch.empty_like(parameter, dtype=dtype, device=world.device), parameter.requires_grad
        )
        context._convert_to_deepspeed_param(partitioned)
        partitioned.partition()
        partitioned.ds_tensor.zero_()  # the padding, too
        return partitioned

    def local_part(parameter: Any) -> tuple[torch.Size, int, torch.Tensor]:
        begin = min(parameter.ds_tensor.ds_numel * world.rank, parameter.ds_numel)
        return parameter.ds_shape, begin, parameter.ds_tensor[: parameter.ds_numel - begin]

    materialize.materialize(model, partition, world.device)
    return materialize.local_parts(model, local_part)


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> None:
    """See `Backend.backward`. The loss is already scaled, so DeepSpeed must not divide it by the number of micro batches."""
    engine.module.backward(loss, scale_wrt_gas=False)
    if not last:
        engine.module.step()  # counts the micro batch; nothing is updated


def step(engine: Engine, learning_rate: float) -> float:
    """See `Backend.step`."""
    optim.set_learning_rate(engine.optimizer, learning_rate)
    engine.module.step()
    return float(engine.module.get_global_grad_norm())


def save(engine: Engine, folder: Path) -> None:
    """See `Backend.save`."""
    _save(engine.module, folder, engine.module.checkpoint_engine.save)()


def storage_bytes(engine: Engine) -> list[int]:
    """See `Backend.storage_bytes`. DeepSpeed collects what it saves while it saves, so it runs a save that writes nothing."""
    storages: dict[int, torch.Tensor] = {}
    with TemporaryDirectory() as folder:
        _save(engine.module, Path(folder), lambda state_dict, path: collect_storages(state_dict, storages))()
    return [storage.nbytes for storage in storages.values() if storage.nbytes]


def stage(engine: Engine, folder: Path, stager: Stager, _: dist.ProcessGroup) -> Callable[[], object]:
    """See `Backend.stage`. DeepSpeed collects its state now; only the last part of its save, a torch.save per file, runs later."""
    staged: list[tuple[Any, str]] = []
    write = engine.module.checkpoint_engine.save
    finish = _save(
        engine.module, folder, lambda state_dict, path: staged.append((stager.copy_object(state_dict), path))
    )

    def write_staged() -> None:
        for state, path in staged:
            write(state, path)
        finish()

    return write_staged


def _save(module: Any, folder: Path, write: Callable[..., object]) -> Callable[[], None]:
    """Let DeepSpeed save with `write`. Returns a function that finishes this rank's save, or raises its error."""
    with _collected_errors(module, write) as errors:
        module.save_checkpoint(str(folder), TAG, save_latest=False, exclude_frozen_parameters=module.adapter_only)

    def finish() -> None:
        if errors:
            raise errors[0]
        if dist.get_rank() == 0:
            (folder / "latest").write_text(TAG, encoding="utf-8")  # DeepSpeed's own programs read it

    return finish


@contextmanager
def _collected_errors(module: Any, write: Callable[..., object]) -> Iterator[list[Exception]]:
    """Collect write errors instead of raising them at once: the other ranks wait in DeepSpeed's barriers for this one."""
    errors: list[Exception] = []

    def collecting(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return work(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return call

    files = module.checkpoint_engine
    files.save, module._copy_recovery_script = collecting(write), collecting(module._copy_recovery_script)
    try:
        yield errors
    finally:
        del files.save, module._copy_recovery_script


def load(engine: Engine, folder: Path) -> None:
    """See `Backend.load`."""
    with optim.kept_peak_ratios(engine.optimizer):
        engine.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=not engine.module.adapter_only)


def local_state(engine: Engine) -> dict[str, dict[str, TensorPart]]:
    """See `Backend.local_state`."""
    return zero_partitions.local_state(engine.module.module, engine.optimizer)


def apply_local_state(engine: Engine) -> None:
    """See `Backend.apply_local_state`."""
    zero_partitions.apply_local_state(engine.optimizer)


def weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """See `Backend.weights`."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_full_fp32_param(parameter).detach().float().cpu()
