"""Writes random checkpoints of four ranks for the benchmark of merges: DCP, torch's Hugging Face shards, ZeRO-3."""

import json
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

RANKS = 4
SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 1003),
    "0.5b": (1024, 4096, 12, 16, 8, 128_256),
    "1.5b": (2048, 8192, 16, 32, 8, 128_256),
    "3b": (3072, 8192, 28, 24, 8, 128_256),
    "6b": (4096, 14_336, 23, 32, 8, 128_256),
}


def llama_config(size: str) -> Any:
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return {
            name: tuple(value.shape)
            for name, value in AutoModelForCausalLM.from_config(llama_config(size)).state_dict().items()
        }


def write_sources(folder: Path, size: str, zero: bool, hf: bool) -> None:
    from tests.jobs.ranks import spawn

    folder.mkdir(parents=True)
    write_base(folder / "base", size)
    spawn(write_rank, RANKS, folder, size, zero, hf)


def write_base(folder: Path, size: str) -> None:
    """The model folder for --base: config and headers. The weights are zeros; the merge does not read them."""
    from jobs.tensor_io import dtypes, safetensors

    llama_config(size).save_pretrained(folder)
    all_shapes = shapes(size)
    header, _, length = safetensors.make_header([(name, shape, dtypes.BF16) for name, shape in all_shapes.items()])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(length)
    (folder / "names.json").write_text(json.dumps(list(all_shapes)))


def write_rank(rank: int, folder: Path, size: str, zero: bool, hf: bool) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(rank)
    state, all_shapes = {}, shapes(size)
    # all weights share the numbers of one random tensor: otherwise writing 6b would need 24 GB of memory
    numbers = torch.empty(max(-(-shape[0] // RANKS) * prod(shape[1:]) for shape in all_shapes.values())).normal_(
        std=0.02
    )
    for name, shape in all_shapes.items():
        rows = -(-shape[0] // RANKS)
        mine = max(0, min(rows, shape[0] - rank * rows))
        local = numbers[: mine * prod(shape[1:])].view(mine, *shape[1:])
        local = local.clone() if hf else local  # safetensors refuses tensors that share memory
        state[name] = DTensor.from_local(
            local,
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
    dcp.save({"model": state}, checkpoint_id=folder / "dcp")
    if hf:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        dcp.save(
            state, storage_writer=HuggingFaceStorageWriter(str(folder / "hf"), save_distributed=True, thread_count=1)
        )
    del state
    if zero:
        write_zero(rank, folder / "zero", all_shapes)
    dist.barrier()
    dist.destroy_process_group()


def write_zero(rank: int, folder: Path, all_shapes: dict[str, tuple[int, ...]]) -> None:
    """Files laid out like those of DeepSpeed's ZeRO-3; training a model of this size would need too much memory."""
    import torch

    step_folder = folder / "global_step1"
    step_folder.mkdir(parents=True, exist_ok=True)
    numel = sum(-(-prod(shape) // RANKS) for shape in all_shapes.values())
    flat, mean, square = (torch.empty(numel).normal_(std=0.02) for _ in range(3))
    state = {0: {"step": torch.tensor(1.0), "exp_avg": mean, "exp_avg_sq": square}}
    optimizer = {
        "zero_stage": 3,
        "partition_count": RANKS,
        "optimizer_state_dict": {"state": state, "param_groups": [{"params": [0]}]},
        "fp32_flat_groups": [flat],
    }
    model_state = {
        "module": OrderedDict(), "buffer_names": [], "shared_params": {}, "frozen_param_shapes": None,
        "frozen_param_fragments": None, "ds_version": "0.19.8",
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in all_shapes.items())],
    }  # fmt: skip
    stem = f"zero_pp_rank_{rank}_mp_rank_00_"
    torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, step_folder / f"{stem}optim_states.pt")
    torch.save(model_state, step_folder / f"{stem}model_states.pt")
    (folder / "latest").write_text("global_step1")
