"""The training of the programs in examples/custom in one process, with plain transformers and torch: the reference."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

Tokens = list[list[int]]
"""The rows of a batch."""
RATE, CLIPPED_AT, BLOCKS = 1e-3, 1.0, 2


@dataclass(frozen=True)
class Recipe:
    """How a program trains. The numbers are those that it has, or the defaults of its library."""

    weight_decay: float
    decays: bool
    """Whether the learning rate falls to zero in a line."""


RECIPES = {
    "accelerate_train.py": Recipe(0.01, decays=False),  # torch's AdamW
    "trainer_train.py": Recipe(0.0, decays=True),  # TrainingArguments
}


def make_model(folder: Path) -> None:
    """Write a tiny Llama with random weights that are large enough for the loss to move in a few steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1024, num_key_value_heads=2, initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def losses(
    model: Path, batches: list[list[Tokens]], recipe: Recipe, accumulated: int
) -> tuple[list[float], LlamaForCausalLM]:
    """Train on `batches`: those of all ranks side by side, in order. Returns the loss of each, and the trained model."""
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=recipe.weight_decay)
    steps = len(batches) // accumulated
    found = []
    for step in range(steps):
        if recipe.decays:
            optimizer.param_groups[0]["lr"] = RATE * (steps - step) / steps
        for ranks in batches[step * accumulated : (step + 1) * accumulated]:
            for tokens in ranks:
                loss = loss_of(network, tokens)
                (loss / accumulated / len(ranks)).backward()
                found.append(loss.item())
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIPPED_AT)
        optimizer.step()
        optimizer.zero_grad()
    return found, network


def loss_of(network: LlamaForCausalLM, tokens: Tokens) -> torch.Tensor:
    """The loss of one batch."""
    rows = torch.tensor(tokens)
    logits = network(input_ids=rows).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
