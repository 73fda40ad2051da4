"""Small models and batches for tests of the forward and backward pass."""

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
    """A model of two small blocks with grouped queries. Every call with the same arguments gives the same weights."""
    torch.manual_seed(0)
    special_tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = AutoConfig.for_model(kind, **(SMALL | special_tokens | extra))
    model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.train()


def adapted(model: Any, targets: str | list[str] = "all-linear", dropout: float = 0.0) -> Any:
    """The model with LoRA adapters that already change its output."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model


def rows(lengths: list[int], pack_into: int | None = None, trained: float = 0.5) -> batches.Rows:
    """Samples of these lengths with random tokens, of which the share `trained` is trained."""
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(3, SMALL["vocab_size"], size=offsets[-1]).astype(np.int32)
    is_trained = (random.random(offsets[-1]) < trained).astype(np.uint8)
    samples = token_dataset.from_parts([Part(tokens, is_trained, offsets)])
    return batches.make_rows(samples, np.arange(len(lengths)), pack_into)


def whole(all_rows: batches.Rows) -> batches.Batch:
    """All rows in one batch."""
    return batches.collate(all_rows, np.arange(len(all_rows)), pad=0)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every trainable parameter; fails if one has none. Clears them in the model."""
    grads = {name: item.grad for name, item in model.named_parameters() if item.requires_grad}
    assert all(value is not None for value in grads.values())
    model.zero_grad()
    return grads


def check_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rel: float) -> None:
    """Each gradient differs from the expected one by at most `rel` of its norm."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        scale = expected[name].float().norm().item() + 1e-8
        assert (value.float() - expected[name].float()).norm().item() <= rel * scale, name
