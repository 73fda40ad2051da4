"""Adds noise to the output of the input embedding while training (NEFTune, Jain 2023, arXiv 2310.05914)."""

import math

import torch
from torch import nn

from jobs.model.unwrap import causal_lm


def attach(model: nn.Module, alpha: float | None) -> None:
    """Let the input embedding add uniform noise of at most alpha / sqrt(length * hidden) in training mode, as a Trainer does.

    `length` are the tokens of a row with its padding. None: no noise. Call it before sharding.
    """
    if not alpha:
        return

    def add_noise(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        largest = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.zeros_like(output).uniform_(-largest, largest)

    causal_lm(model).get_input_embeddings().register_forward_hook(add_noise)
