"""Small random models whose files are quantized: fp8 as DeepSeek stores it, fp8 of compressed-tensors, mxfp4 of gpt-oss."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
BLOCK = (128, 128)
Tensors = dict[str, torch.Tensor]


def quantize(source: Path, out: Path, kind: str, block: tuple[int, int] | None = BLOCK) -> Tensors:
    """Copy a model folder with random codes and scales for its linear layers. Returns the weights that they mean, in fp32.

    The files hold one or two tensors each, so that scales lie in other files than their weights.
    """
    generator = torch.Generator().manual_seed(1)
    plain = load_file(source / "model.safetensors")
    stored, meant = {}, {}
    for name, value in plain.items():
        is_expert_of_mxfp4 = kind == "mxfp4" and value.ndim == 3
        is_linear = value.ndim == 2 and ".layers." in name and "gate.weight" not in name and "router" not in name
        if is_expert_of_mxfp4:
            new, meant[name] = mxfp4(name, value.shape, generator)
        elif is_linear and kind != "mxfp4":
            new, meant[name] = fp8(name, value.shape, kind, block, generator)
        else:
            new, meant[name] = {name: value.to(torch.bfloat16)}, value.to(torch.bfloat16).float()
        stored |= new
    out.mkdir()
    for path in source.iterdir():
        if "model.safetensors" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    names = sorted(stored, key=lambda name: (name.endswith(("_scale", "_scale_inv", "_scales")), name))
    groups = [names[start : start + 7] for start in range(0, len(names), 7)]
    files = {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}
    for file, group in files.items():
        save_file({name: stored[name].contiguous() for name in group}, out / file, metadata={"format": "pt"})
    index = {name: file for file, group in files.items() for name in group}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    fields = json.loads((out / "config.json").read_text())
    fields |= {"quantization_config": section(kind, block), "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(fields))
    return meant


def section(kind: str, block: tuple[int, int] | None) -> dict[str, Any]:
    if kind == "fp8":
        size = {"weight_block_size": list(block) if block else None}
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **size}
    if kind == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    group = {"weights": weights, "targets": ["Linear"], "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


def fp8(
    name: str, shape: torch.Size, kind: str, block: tuple[int, int] | None, generator: torch.Generator
) -> tuple[Tensors, torch.Tensor]:
    """Codes with their scales, and the numbers that they mean, made element by element in another way than in the code."""
    codes = (torch.randn(shape, generator=generator) * 60).clamp(-448, 448).to(FP8)
    rows, columns = shape
    size = (1, columns) if kind == "channel" else block or (rows, columns)
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    scales = torch.rand(grid, generator=generator) * 1e-3 + 1e-4
    ending = "_scale_inv"
    if kind == "channel":
        scales, ending = scales.to(torch.bfloat16), "_scale"
    numbers = torch.empty(shape)
    for row in range(grid[0]):
        for column in range(grid[1]):
            part = slice(row * size[0], (row + 1) * size[0]), slice(column * size[1], (column + 1) * size[1])
            numbers[part] = codes[part].float() * scales[row, column].float()
    stored = {name: codes, name + ending: scales if block or kind == "channel" else scales.view(())}
    return stored | ({name.removesuffix("weight") + "input_scale": torch.ones(1)} if kind == "channel" else {}), numbers


def mxfp4(name: str, shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """Codes of a weight (experts, in, out), and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, columns, rows = shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, numbers
