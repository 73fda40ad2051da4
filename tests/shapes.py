"""Small models of every family that launcher/estimate/parameters.py knows, as transformers and PEFT build them."""

from typing import Any

import pytest

from conf.schema_model import Architecture

SMALL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with wide heads": {"head_dim": 64},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {},
    "qwen3 with biases": {"head_dim": 32, "attention_bias": True},
    "mixtral": {"num_local_experts": 4},
}


def small(family: str, *, tied: bool = False, layers: int = 3) -> Architecture:
    shape = SMALL | {"num_hidden_layers": layers}
    return Architecture(model_type=family.split()[0], tie_word_embeddings=tied, extra=FAMILIES[family], **shape)


def built(shape: Architecture, device: str = "meta", dtype: str = "bfloat16") -> Any:
    """The model that transformers makes of a shape."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    described = {name: value for name, value in vars(shape).items() if name not in ("model_type", "tower_gib", "extra")}
    config = transformers.AutoConfig.for_model(shape.model_type, **described, **shape.extra, use_cache=False)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )


def adapted(model: Any, targets: list[str], r: int = 8) -> Any:
    peft = pytest.importorskip("peft")
    wanted = "all-linear" if targets == ["all-linear"] else targets
    plan = peft.LoraConfig(r=r, target_modules=wanted, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, plan, autocast_adapter_dtype=False)
