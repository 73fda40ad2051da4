"""Writes sharded checkpoints of tiny models with torch FSDP2 and DeepSpeed, without code of Muster."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "tied": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "gqa": ("qwen2", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "odd": ("llama", {**SMALL, "hidden_size": 66, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 97,
                      "head_dim": 22, "vocab_size": 131, "tie_word_embeddings": False}),
    "padded": ("llama", {**SMALL, "vocab_size": 1003, "num_hidden_layers": 1, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields), dtype=torch.float32
    )


def base(name: str, folder: Path) -> Path:
    """The model as a Hugging Face folder, before training."""
    build(name).save_pretrained(folder / name)
    return folder / name


def step(model: torch.nn.Module, backward: Callable[[torch.Tensor], object], update: Callable[[], object]) -> None:
    """One optimizer step, so that there are moments, and fp32 weights that bf16 cannot represent."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 100, (2, 16))
    backward(model(input_ids=tokens, labels=tokens).loss)
    update()


def write(rank: int, folder: Path, names: list[str]) -> None:
    """Every layout of every model: folder/NAME/{fsdp,zero1,zero2,zero3,bf16,...}."""
    dist.init_process_group("gloo")
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in names:
        fsdp(folder / name, name)
        slices(folder / name, name)
        for stage in (1, 2, 3):
            zero(folder / name / f"zero{stage}", name, stage)
        zero(folder / name / "bf16_zero1", name, 1, bf16=True)
        zero(folder / name / "bf16_zero3", name, 3, bf16=True)
    if "gqa" in names:
        zero(folder / "gqa/frozen2", "gqa", 2, frozen=True)
        zero(folder / "gqa/frozen3", "gqa", 3, frozen=True)
    if "odd" in names:
        zero(folder / "odd/bf16_fp32acc", "odd", 1, bf16=True, accumulated="fp32")
    dist.barrier()
    dist.destroy_process_group()


def fsdp(folder: Path, name: str) -> None:
    """`fsdp`: weights alone, as Accelerate writes them. `both`: also optimizer state, as Muster does. `app`: as torchtitan does."""
    size = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        if size == 4
        else init_device_mesh("cpu", (size,))
    )
    model = build(name)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, lambda loss: loss.backward(), optimizer.step)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights}, checkpoint_id=folder / "fsdp/pytorch_model_fsdp_0")
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "both")
    dcp.save({"app": {"model": weights, "optimizer": moments}}, checkpoint_id=folder / "app")


def slices(folder: Path, name: str) -> None:
    """Cut every weight in two dimensions, as tensor parallelism with FSDP does; 3-D expert weights in the first and last."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2) if size % 2 == 0 else (1, size))
    state = {}
    for key, value in build(name).state_dict().items():
        cuts = [Shard(0), Shard(value.ndim - 1)]
        state[key] = distribute_tensor(value, mesh, cuts)
    dcp.save({"model": state}, checkpoint_id=folder / "slices/pytorch_model_fsdp_0")


def zero(
    folder: Path, name: str, stage: int, *, bf16: bool = False, frozen: bool = False, accumulated: str = ""
) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = build(name)
    if frozen:
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "sub_group_size": 20_000},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": accumulated or None},
        },
    )
    step(engine, engine.backward, engine.step)
    engine.save_checkpoint(str(folder), tag="global_step1")
    if accumulated:
        from deepspeed.utils import safe_get_full_fp32_param

        live = {key: safe_get_full_fp32_param(value).detach().clone() for key, value in model.named_parameters()}
        if dist.get_rank() == 0:
            torch.save(live, folder.parent / "live.pt")
