"""The ways in which a model can be told where the samples of a packed row begin, as arguments of its forward."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from jobs.data.batches import Batch

Inputs = dict[str, Any]
DEFAULT = "positions"


def model_inputs(batch: Batch, config: PreTrainedConfig, borders: str = DEFAULT) -> Inputs:
    """The arguments of the model's forward. For packed rows they contain the borders in the way that `borders` names."""
    inputs: Inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.cu_seqlens is None:
        return inputs
    attention = str(config._attn_implementation)
    if "flash" in attention or "varlen" in attention:
        inputs |= _cu_seqlens(batch, config)
    return inputs | WAYS[borders](batch, config)


def _cu_seqlens(batch: Batch, _: PreTrainedConfig) -> Inputs:
    """For flash attention and for the kernels of linear attention: where each sample begins in all rows laid end to end."""
    inputs: Inputs = {}
    for side in "qk":
        inputs |= {f"cu_seq_lens_{side}": batch.cu_seqlens, f"max_length_{side}": batch.max_length}
    return inputs


def _seq_idx(batch: Batch, _: PreTrainedConfig) -> Inputs:
    """For the kernels of Mamba and short convolutions: the number of its sample for each token."""
    return {"seq_idx": (_sample_numbers(batch) - 1).to(torch.int32)}


def _mask(batch: Batch, config: PreTrainedConfig) -> Inputs:
    """A mask of pairs of tokens, for each kind of attention layers. It costs the square of the row's length in memory."""
    text_config = config.get_text_config()
    kinds, window = set(getattr(text_config, "layer_types", None) or ()), getattr(text_config, "sliding_window", None)
    attention = str(config._attn_implementation)
    if kinds:
        return {
            "attention_mask": {kind: _pairs(batch, window if "sliding" in kind else None, attention) for kind in kinds}
        }
    return {"attention_mask": _pairs(batch, window, attention)}


def _pairs(batch: Batch, window: int | None, attention: str) -> Any:
    """Which token sees which, in the form that the attention takes: boolean, added to the scores, or flex's blocks."""
    samples = _sample_numbers(batch)
    rows, length = samples.shape

    def sees(row: Any, _head: Any, query: Any, key: Any) -> Any:
        seen = (query >= key) & (samples[row, query] == samples[row, key])
        return seen & (query - key < window) if window else seen

    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, rows, None, length, length, device=samples.device)
    tokens = torch.arange(length, device=samples.device)
    row_numbers = torch.arange(rows, device=samples.device)[:, None, None]
    allowed = sees(row_numbers, 0, tokens[None, :, None], tokens[None, None, :])[:, None]
    if attention == "eager":
        return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
    return allowed


def _sample_numbers(batch: Batch) -> torch.Tensor:
    """The number of each token's sample in its row, from 1: int64, shape (rows, length)."""
    assert batch.position_ids is not None
    return (batch.position_ids == 0).cumsum(1)


WAYS: Mapping[str, Callable[[Batch, PreTrainedConfig], Inputs]] = {
    DEFAULT: lambda batch, config: {},
    "cu_seq_lens": _cu_seqlens,
    "seq_idx": _seq_idx,
    "seq_idx and cu_seq_lens": lambda batch, config: _seq_idx(batch, config) | _cu_seqlens(batch, config),
    "mask": _mask,
}
"""Name -> the arguments that it adds. The first that passes the trial of `packing_probe` is used."""
