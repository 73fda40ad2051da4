"""Prepares the models of benchmarks/loops.py: random weights, Liger's kernels, float8 products, NF4 weights."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

GPU = torch.cuda.is_available()


def reset_rotary(model: nn.Module, config: LlamaConfig, device: torch.device) -> None:
    """Recompute the rotary frequencies in fp32: they were made on the meta device, or in the dtype of the weights."""
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)


def randomize(model: nn.Module) -> None:
    """Fill this rank's part of each weight with random numbers, under ZeRO-3 (ds_tensor), FSDP (DTensor) or neither."""
    with torch.no_grad():
        for parameter in model.parameters():
            shard = getattr(parameter, "ds_tensor", parameter)
            local = shard.to_local() if hasattr(shard, "to_local") else shard
            local.normal_(0, 0.02)


def materialize(model: nn.Module, config: LlamaConfig, device: torch.device) -> None:
    """Give a model on the meta device random weights."""
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.tie_weights()
    randomize(model)
    reset_rotary(model, config, device)


def use_liger(compiled: bool) -> None:
    """Use Liger's fused loss. Its other kernels help only if the blocks are not compiled."""
    if GPU:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        others = {"rope": not compiled, "swiglu": not compiled, "rms_norm": not compiled}
        apply_liger_kernel_to_llama(**others, cross_entropy=False, fused_linear_cross_entropy=True)


def use_float8(model: nn.Module, recipe: str, float8_all_gather: bool) -> None:
    """Use torchao's float8 products in all linear layers of blocks, except adapters; FSDP may also gather in float8."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    float8_config = (
        Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        if float8_all_gather
        else Float8LinearConfig.from_recipe_name(recipe)
    )
    convert_to_float8_training(
        model, config=float8_config, module_filter_fn=lambda _, name: "lm_head" not in name and "lora_" not in name
    )


def quantize_nf4(model: nn.Module, device: torch.device) -> None:
    """Quantize the blocks with bitsandbytes, layer by layer: NF4 with double quantization."""
    import bitsandbytes as bnb

    nf4: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, **nf4, device="cpu"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, module=new, **nf4)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new.to(device))
    model.is_loaded_in_4bit = True
    if GPU:
        torch.cuda.empty_cache()
