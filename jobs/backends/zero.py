"""DeepSpeed ZeRO-1, 2 and 3, through `deepspeed.initialize`."""

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

from conf import deepspeed as derived
from conf.choices import AdapterKind, Checkpointing
from conf.schema import Config
from jobs.backends import Engine, zero_partitions
from jobs.backends.host_staging import Stager, collect_storages
from jobs.distributed.process_group import World
from jobs.model import compile, materialize, prepare
from jobs.model.build import blocks, compute_dtype, skeleton
from jobs.tensor_io.slices import Part
from jobs.training import optimizer as optim

TAG = "zero"
"""DeepSpeed's name for the folder inside a checkpoint; ours is the step."""


def wrap(model: nn.Module, config: Config, world: World, resumed: bool = False) -> Engine:
    """Hand the model to DeepSpeed; one without weights gets them before, on ZeRO-3 once it is partitioned.

    `resumed` leaves out what a checkpoint is going to overwrite.
    """
    start(world)
    import deepspeed

    prepare.install(model, config, world)
    if compile.as_one(config, world):  # hooks inside a block would cut its compiled code into dozens of pieces
        deepspeed.utils.set_z3_leaf_modules(model, list({type(block) for block in blocks(model)}))
    read = 0
    if materialize.is_empty(model):
        load = _partitioned if config.parallel.zero_stage == 3 else _whole
        read = materialize.fill(model, skeleton, load(model, config, world), config, world, resumed)
    model.train()  # DeepSpeed casts the parameters; buffers, such as rotary frequencies, must stay fp32
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=optim.build(model, config), config=derived.plan(config, world.size)
    )
    engine.adapter_only = config.adapter.kind is not AdapterKind.none
    if config.parallel.zero_stage == 3 and config.train.activation_checkpointing is Checkpointing.selective:
        _hide(optimizer.parameter_offload)
    return Engine(engine, optimizer, config.train.max_grad_norm, read)


def start(world: World) -> None:
    """Let DeepSpeed find the process group and the device of this rank."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else DeepSpeed guesses, and warns
    import deepspeed

    # Gloo needs no such kernel. Building it takes 20 s, and a rank killed meanwhile leaves a lock all later ones wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def _hide(offload: Any) -> None:
    """Let selective recomputation not see what is gathered and freed around the modules inside a block: the second time that is
    something else, and torch 2.13 refuses operators that were not there in forward."""

    def unseen(hook: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def call(module: nn.Module) -> None:
            with _disable_current_modes():
                hook(module)

        return call

    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, unseen(getattr(offload, name)))


def _whole(model: nn.Module, config: Config, world: World) -> dict[str, Part]:
    """Room for every parameter on every rank, in the precision of compute: DeepSpeed makes its masters from that."""
    dtype = compute_dtype(config)
    materialize.materialise(model, lambda item: torch.empty_like(item, dtype=dtype, device=world.device), world.device)
    return materialize.parts(model, lambda item: (item.shape, 0, item))


def _partitioned(model: nn.Module, config: Config, world: World) -> dict[str, Part]:
    """Room for this rank's partition of every parameter: a run of its elements, padded to equal length over the ranks.

    `zero.Init` as a context would make each parameter whole on every rank and broadcast it; its parts make empty partitions.
    """
    import deepspeed

    dtype, context = compute_dtype(config), deepspeed.zero.Init(config_dict_or_path=derived.plan(config, world.size))
    if context.mem_efficient_linear and not compile.as_one(config, world):
        # Else every linear layer keeps its gathered weight until its backward. Compiled blocks do not, and would be compiled
        # for each block anew: it looks at a weight's number (torch 2.11).
        context._enable_mem_efficient_linear()

    def partition(parameter: nn.Parameter) -> nn.Parameter:
        made = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=world.device), parameter.requires_grad)
        context._convert_to_deepspeed_param(made)
        made.partition()
        made.ds_tensor.zero_()  # the padding, too
        return made

    def held(parameter: nn.Parameter) -> tuple[torch.Size, int, torch.Tensor]:
        begin = min(parameter.ds_tensor.ds_numel * world.rank, parameter.ds_numel)
        return parameter.ds_shape, begin, parameter.ds_tensor[: parameter.ds_numel - begin]

    materialize.materialise(model, partition, world.device)
    return materialize.parts(model, held)


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> None:
    engine.module.backward(loss, scale_wrt_gas=False)
    if not last:
        engine.module.step()  # counts the micro batch; nothing is updated


def step(engine: Engine, learning_rate: float) -> float:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.module.step()
    return float(engine.module.get_global_grad_norm())


def save(engine: Engine, folder: Path) -> None:
    _saved(engine.module, folder, engine.module.checkpoint_engine.save)()


def storage_bytes(engine: Engine) -> list[int]:
    """Bytes of each storage that `staged` copies: DeepSpeed gathers what it saves, so it is let save, to nowhere."""
    found: dict[int, torch.Tensor] = {}
    with TemporaryDirectory() as folder:
        _saved(engine.module, Path(folder), lambda state_dict, path: collect_storages(state_dict, found))()
    return [held.nbytes for held in found.values() if held.nbytes]


def stage(engine: Engine, folder: Path, stager: Stager, _: dist.ProcessGroup) -> Callable[[], object]:
    """DeepSpeed gathers what it saves; only the last of it, a torch.save to each file, is left for later."""
    later: list[tuple[Any, str]] = []
    write = engine.module.checkpoint_engine.save
    end = _saved(engine.module, folder, lambda state_dict, path: later.append((stager.tree(state_dict), path)))

    def work() -> None:
        for state, path in later:
            write(state, path)
        end()

    return work


def _saved(module: Any, folder: Path, write: Callable[..., object]) -> Callable[[], None]:
    """Let DeepSpeed save, by `write`; returns what ends this rank's part of it, and raises what went wrong meanwhile."""
    with _errors_kept(module, write) as failed:
        module.save_checkpoint(str(folder), TAG, save_latest=False, exclude_frozen_parameters=module.adapter_only)

    def end() -> None:
        if failed:
            raise failed[0]
        if dist.get_rank() == 0:
            (folder / "latest").write_text(TAG, encoding="utf-8")  # DeepSpeed's own programs look for it

    return end


@contextmanager
def _errors_kept(module: Any, write: Callable[..., object]) -> Iterator[list[Exception]]:
    """What fails to be written is raised later: DeepSpeed's other ranks wait in its barriers."""
    failed: list[Exception] = []

    def caught(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return work(*arguments, **named)
            except (OSError, RuntimeError) as error:
                failed.append(error)

        return call

    files = module.checkpoint_engine
    files.save, module._copy_recovery_script = caught(write), caught(module._copy_recovery_script)
    try:
        yield failed
    finally:
        del files.save, module._copy_recovery_script


def load(engine: Engine, folder: Path) -> None:
    engine.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=not engine.module.adapter_only)


def local_state(engine: Engine) -> dict[str, dict[str, Part]]:
    return zero_partitions.held(engine.module.module, engine.optimizer)


def local_state_filled(engine: Engine) -> None:
    zero_partitions.filled(engine.optimizer)


def weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_full_fp32_param(parameter).detach().float().cpu()
