"""Causal attention as transformers calls it, in the two ways that it lacks: by cuDNN, and inside the samples of packed rows.

Neither builds a mask, and neither asks the GPU anything.
"""

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from jobs.distributed import context_parallel

FASTEST = [
    SDPBackend.CUDNN_ATTENTION,  # 562/476 TFLOP/s forward/backward on H200, against 323/274 of torch's flash kernel
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HALF = (torch.float16, torch.bfloat16)
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Before torch 2.12 the kernel takes fewer heads of keys without being told."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row, by cuDNN where it can; inside each sample where `cu_seq_lens_q` says their borders,
    int32 over all rows laid end to end, the longest of `max_length_q` tokens. Takes (rows, heads, length, head size), and
    key and value with fewer heads; returns (rows, length, heads, head size)."""
    if context_parallel.ranks() > 1:
        query, key, value = (context_parallel.heads_of(item) for item in (query, key, value))
    elif attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    rows, _, length, _ = query.shape
    borders, longest = cu_seq_lens_q, max_length_q or 0
    if borders is None and sliding_window is not None and sliding_window < length:
        borders = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        longest = length
    if borders is not None:
        out = _inside(query, key, value, borders, longest, dropout, scaling, sliding_window)
    else:
        out = _causal(query, key, value, dropout, scaling, None).transpose(1, 2).contiguous()
    return context_parallel.tokens_of(out), None


def _inside(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention inside each sample, whatever rows they lie in; returns (rows, length, heads, head size)."""
    rows, _, length, _ = query.shape
    flat = [item.transpose(1, 2).flatten(0, 1) for item in (query, key, value)]  # (tokens, heads, head size)
    if query.is_cuda and query.dtype in HALF and not dropout:  # torch's flash attention, which cannot drop
        left = -1 if window is None else window - 1
        out = varlen_attn(*flat, borders, borders, longest, longest, scale=scaling, window_size=(left, 0), **GROUPED)
        return out.unflatten(0, (rows, length))
    sizes = borders.diff().tolist()
    out = torch.cat(
        [
            _causal(*(part.transpose(0, 1)[None] for part in sample), dropout, scaling, window)[0].transpose(0, 1)
            for sample in zip(*(item.split(sizes) for item in flat), strict=True)
        ]
    )
    return out.unflatten(0, (rows, length))


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Of (rows, heads, length, head size), each token sees itself and those before it: all, or the last `window`."""
    length, mask = query.shape[2], None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    with sdpa_kernel(FASTEST, set_priority=True):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
