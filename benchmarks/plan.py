"""Times the planning of a merge for a checkpoint in the shape of Llama-3-70B that has only metadata, and no weights.

    python benchmarks/plan.py [--ranks 64] [--folder DIR]

The DCP checkpoint has weights and both moments of every parameter, cut over all ranks: its `.metadata` is torch's own, and its
shards are sparse files of the right length. ZeRO-3's files cannot be written without their contents; they have the same number of
tensors and ranks, and a hidden size of 64. The seconds are those of the whole process `python -m jobs.consolidate FOLDER --plan`,
including imports and a probe of the disk (256 MiB).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def shapes(hidden: int, intermediate: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Those of Llama-3-70B for 8192, 28672 and 128256; keys and values have an eighth of the heads."""
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 8, hidden),
        "self_attn.v_proj": (hidden // 8, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    found |= {f"model.layers.{layer}.{name}.weight": shape for layer in range(80) for name, shape in block.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_base(
    folder: Path, all_shapes: dict[str, tuple[int, ...]], hidden: int, intermediate: int, vocabulary: int
) -> None:
    """A model folder with config and headers; its weights are zeros."""
    from transformers import LlamaConfig

    from jobs.tensor_io import dtypes, safetensors

    LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=vocabulary, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    header, _, length = safetensors.make_header([(name, shape, dtypes.BF16) for name, shape in all_shapes.items()])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(length)


def write_dcp(folder: Path, all_shapes: dict[str, tuple[int, ...]], ranks: int) -> int:
    """Returns the bytes of `.metadata`."""
    import pickle

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir()
    state, storage, filled = {}, {}, [0] * ranks
    keys = [f"model.{name}" for name in all_shapes]
    keys += [f"optimizer.state.{name}.{moment}" for name in all_shapes for moment in ("exp_avg", "exp_avg_sq")]
    for key in keys:
        name = key.removeprefix("model.")
        shape = all_shapes.get(name) or all_shapes[key.removeprefix("optimizer.state.").rpartition(".")[0]]
        chunks, rows = [], -(-shape[0] // ranks)
        for rank in range(ranks):
            sizes = (max(0, min(rows, shape[0] - rank * rows)), *shape[1:])
            starts = (min(rank * rows, shape[0]), *(0 for _ in shape[1:]))
            chunks.append(ChunkStorageMetadata(torch.Size(starts), torch.Size(sizes)))
            length = 4 * prod(sizes) + 1500  # what torch.save adds
            storage[MetadataIndex(key, torch.Size(starts))] = _StorageInfo(f"__{rank}_0.distcp", filled[rank], length)
            filled[rank] += length
        state[key] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state, planner_data=None, storage_data=storage)))
    for rank, size in enumerate(filled):
        with (folder / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(size)
    return (folder / ".metadata").stat().st_size


def write_zero(folder: Path, all_shapes: dict[str, tuple[int, ...]], ranks: int) -> None:
    """Files laid out like those of DeepSpeed's ZeRO-3."""
    from collections import OrderedDict

    import torch

    step_folder = folder / "global_step1"
    step_folder.mkdir(parents=True)
    numel = sum(-(-prod(shape) // ranks) for shape in all_shapes.values())
    shaped = OrderedDict((name, torch.Size(shape)) for name, shape in all_shapes.items())
    for rank in range(ranks):
        optimizer = {
            "zero_stage": 3,
            "partition_count": ranks,
            "fp32_flat_groups": [torch.zeros(numel)],
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(numel), "exp_avg_sq": torch.zeros(numel)}}},
        }
        model_state = {
            "param_shapes": [shaped],
            "buffer_names": [],
            "module": {},
            "shared_params": {},
            "ds_version": "0.19.8",
        }
        stem = f"zero_pp_rank_{rank}_mp_rank_00_"
        torch.save({"optimizer_state_dict": optimizer}, step_folder / f"bf16_{stem}optim_states.pt")
        torch.save(model_state, step_folder / f"{stem}model_states.pt")
    (folder / "latest").write_text("global_step1")


def time_plan(checkpoint: Path, base: Path) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "jobs.consolidate", str(checkpoint), "--base", str(base), "--plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("model-")), flush=True)
    return round(seconds, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are written; needs 2 GB for ZeRO-3 and the probe"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="plan-") as scratch:
        folder, result = Path(scratch), {"ranks": options.ranks}
        for kind, size in (("dcp", (8192, 28_672, 128_256)), ("zero", (64, 224, 1003))):
            all_shapes = shapes(*size)
            write_base(folder / f"base-{kind}", all_shapes, *size)
            if kind == "dcp":
                result["metadata_mib"] = write_dcp(folder / kind, all_shapes, options.ranks) >> 20
            else:
                write_zero(folder / kind, all_shapes, options.ranks)
            result[f"{kind}_s"] = time_plan(folder / kind, folder / f"base-{kind}")
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
