"""Small models and packed batches for tests of the forward and backward pass."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.data import batches, token_dataset
from jobs.data.token_dataset import Part

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def network(kind: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A model of two small blocks with grouped queries; the same weights at every call."""
    torch.manual_seed(0)
    shape = AutoConfig.for_model(kind, **(SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | extra))
    made = AutoModelForCausalLM.from_config(shape, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return made.train()


def adapted(made: Any, targets: str | list[str] = "all-linear", dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    plan = LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    made = get_peft_model(made, plan)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return made


def rows(lengths: list[int], pack_into: int | None = None, trained: float = 0.5) -> batches.Rows:
    """Samples of these lengths with random tokens, a share of them trained."""
    chance = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = chance.integers(3, SMALL["vocab_size"], size=offsets[-1]).astype(np.int32)
    marked = (chance.random(offsets[-1]) < trained).astype(np.uint8)
    found = token_dataset.from_parts([Part(tokens, marked, offsets)])
    return batches.make_rows(found, np.arange(len(lengths)), pack_into)


def whole(found: batches.Rows) -> batches.Batch:
    """All rows in one batch."""
    return batches.collate(found, np.arange(len(found)), pad=0)


def gradients(made: nn.Module) -> dict[str, torch.Tensor]:
    """Of every trained parameter, which all must have one."""
    found = {name: item.grad for name, item in made.named_parameters() if item.requires_grad}
    assert all(value is not None for value in found.values())
    made.zero_grad()
    return found


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rel: float) -> None:
    """Each gradient within `rel` of the other's norm."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = other[name].float().norm().item() + 1e-8
        assert (value.float() - other[name].float()).norm().item() <= rel * scale, name
