"""Checkpoints of torch FSDP 1 and 2 and of DCP, in the layouts of the programs that use them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.jobs.foreign import models

ACCELERATE = "pytorch_model_fsdp_0"


class _State(Stateful):
    """A part of a checkpoint that says itself what is in it."""

    def __init__(self, function: Callable[[], dict[str, Any]]) -> None:
        self.function = function

    def state_dict(self) -> dict[str, Any]:
        return self.function()

    def load_state_dict(self, _: dict[str, Any]) -> None: ...


def _sharded(net: Any, **words: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.model.layers:
        fully_shard(layer, mesh=mesh, **words)
    fully_shard(net, mesh=mesh, **words)
    return net


def _train(net: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([parameter for parameter in net.parameters() if parameter.requires_grad], lr=1e-3)
    for step in range(2):
        tokens = models.batch(step)
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _gathered(net: Any) -> dict[str, torch.Tensor]:
    live = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if live and "lm_head.weight" not in live and "model.embed_tokens.weight" in live:
        live["lm_head.weight"] = live["model.embed_tokens.weight"]
    return live


def _save_as_accelerate(net: Any, folder: Path, *, adapter_only: bool = False) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_offload=False)
    accelerator = SimpleNamespace(
        process_index=dist.get_rank(), num_processes=dist.get_world_size(), is_fsdp2=True,
        is_main_process=dist.get_rank() == 0, wait_for_everyone=dist.barrier,
    )  # fmt: skip
    save_fsdp_model(plugin, accelerator, net, str(folder / "ck"), 0, adapter_only=adapter_only)


def _accelerate(folder: Path, model: str, **words: Any) -> None:
    net = _sharded(models.build(model, words.pop("dtype", torch.float32)), **words)
    _train(net)
    models.keep_truth(_gathered(net), folder)
    _save_as_accelerate(net, folder)


def _with_optimizer(folder: Path, model: str, layout: str) -> None:
    net = _sharded(models.build(model))
    optimizer = _train(net)
    models.keep_truth(_gathered(net), folder)
    weights, moments = get_state_dict(net, optimizer)
    layouts: dict[str, dict[str, Any]] = {
        "both": {"model": weights, "optimizer": moments},
        "raw": {"model": net.state_dict(), "optim": moments},
        "app": {"app": _State(lambda: {"model": weights, "optim": moments})},
        "torchtitan": {
            **get_model_state_dict(net),
            "optimizer": _State(
                lambda: get_optimizer_state_dict(
                    net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
                )
            ),
            "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
            "train_state": _State(lambda: {"step": torch.tensor(2), "ntokens_seen": torch.tensor(64)}),
            "dataloader": {"dp_rank_0": b"x", "world_size": dist.get_world_size()},
        },
    }
    dcp.save(layouts[layout], checkpoint_id=folder / "ck")


def _compiled(folder: Path, model: str) -> None:
    compiled = torch.compile(models.build(model), backend="eager")
    inner = _sharded(compiled._orig_mod)
    _train(inner)
    models.keep_truth(_gathered(inner), folder)
    dcp.save({"model": compiled.state_dict()}, checkpoint_id=folder / "ck" / ACCELERATE)


def _fsdp1(folder: Path, model: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    net: Any = models.build(model)
    policy = ModuleWrapPolicy({type(net.model.layers[0])})
    net = FullyShardedDataParallel(
        net, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )  # fmt: skip
    _train(net)
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
        models.keep_truth(net.state_dict(), folder)
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.SHARDED_STATE_DICT):
        dcp.save({"model": net.state_dict()}, checkpoint_id=folder / "ck" / ACCELERATE)


def _names_of_the_hub(folder: Path, model: str) -> None:
    """One weight per expert, as transformers 4 trained them and save_pretrained writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    net = models.build(model)
    _train(net)
    for parameter in net.parameters():
        dist.broadcast(parameter.data, 0)
    models.keep_truth(net.state_dict(), folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    saved = revert_weight_conversion(net, dict(net.state_dict()))
    cut = {name: distribute_tensor(value.detach().contiguous(), mesh, [Shard(0)]) for name, value in saved.items()}
    dcp.save({"model": cut}, checkpoint_id=folder / "ck" / ACCELERATE)


def _partial(folder: Path, model: str) -> None:
    net = _sharded(models.build(model))
    _train(net)
    models.keep_truth(_gathered(net), folder)
    state = {name: value for name, value in net.state_dict().items() if "lm_head" not in name}
    dcp.save({"model": state}, checkpoint_id=folder / "ck" / ACCELERATE)


def _tensor_parallel(folder: Path, model: str) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net: Any = models.build(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in net.model.layers:
        parallelize_module(layer, mesh, plan)
    models.keep_truth(_gathered(net), folder)
    dcp.save({"model": net.state_dict()}, checkpoint_id=folder / "ck")


def _lora(folder: Path, model: str, *, adapter_only: bool = False) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
        base_model_name_or_path=str(folder / "base"), task_type="CAUSAL_LM",
    )  # fmt: skip
    net: Any = get_peft_model(models.build(model), config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    _train(net)
    live = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        whole = get_peft_model(models.build(model), config)
        whole.load_state_dict(live, strict=False)
        models.keep_truth(whole.merge_and_unload().state_dict(), folder)
        config.save_pretrained(str(folder / "ck"))
    dist.barrier()
    _save_as_accelerate(net, folder, adapter_only=adapter_only)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
CASES: dict[str, Callable[[Path], None]] = {
    **{f"accelerate-{name}": lambda folder, name=name: _accelerate(folder, name) for name in models.MODELS},
    "accelerate-bf16": lambda folder: _accelerate(folder, "untied", dtype=torch.bfloat16),
    "accelerate-mixed": lambda folder: _accelerate(folder, "untied", mp_policy=HALF),
    **{
        f"dcp-{layout}-{name}": lambda folder, layout=layout, name=name: _with_optimizer(folder, name, layout)
        for layout in ("both", "raw", "app", "torchtitan")
        for name in ("untied", "tied")
    },
    "compiled": lambda folder: _compiled(folder, "untied"),
    "fsdp1-untied": lambda folder: _fsdp1(folder, "untied"),
    "fsdp1-tied": lambda folder: _fsdp1(folder, "tied"),
    "hub-names-moe": lambda folder: _names_of_the_hub(folder, "moe"),
    "hub-names-mixtral": lambda folder: _names_of_the_hub(folder, "mixtral"),
    "without-head": lambda folder: _partial(folder, "untied"),
    "tensor-parallel": lambda folder: _tensor_parallel(folder, "untied"),
    "lora": lambda folder: _lora(folder, "untied"),
    "lora-adapter-only": lambda folder: _lora(folder, "untied", adapter_only=True),
}  # fmt: skip
MODEL_OF = {name: next((model for model in models.MODELS if name.endswith(model)), "untied") for name in CASES}


def write(_: int, folder: Path, names: list[str]) -> None:
    """On every rank: folder/NAME/{base,ck,truth.pt} of each case."""
    models.start()
    from accelerate import PartialState

    PartialState(cpu=True)
    for name in names:
        models.save_base(MODEL_OF[name], folder / name)
        CASES[name](folder / name)
        dist.barrier()
    dist.destroy_process_group()
