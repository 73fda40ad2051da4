"""Two attention functions for transformers: causal attention by cuDNN, and causal attention inside packed samples.

Both are `attend`. It builds no mask and never synchronizes with the GPU.
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
from jobs.model.attention_sinks import attention_with_sinks, flash_attention_with_sinks

BACKENDS = [  # in this order of preference
    SDPBackend.CUDNN_ATTENTION,  # 562/476 TFLOP/s forward/backward on H200; torch's flash kernel: 323/274
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HALF = (torch.float16, torch.bfloat16)
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch before 2.12 has no such argument: there the kernel accepts fewer key heads than query heads without it."""


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
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, with the signature that transformers calls.

    query: (rows, heads, length, head size). key and value: the same, or with fewer heads (grouped queries).
    cu_seq_lens_q: int32, cumulative sample boundaries over all rows laid end to end, the longest sample having `max_length_q`
    tokens. With it, attention stays inside each sample; without it, inside each row.
    s_aux: the attention sinks of a model that has them (`jobs.model.attention_sinks`), shape (heads,).
    Returns (rows, length, heads, head size), and None in place of the attention weights.
    """
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise ValueError(f"{len(s_aux)} attention sinks for {query.shape[1]} heads")
    if context_parallel.group_size() > 1:
        query, key, value = (context_parallel.shard_heads(item) for item in (query, key, value))
    elif attention_mask is not None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    rows, _heads, length, _size = query.shape
    boundaries, longest = cu_seq_lens_q, max_length_q or 0
    has_window = sliding_window is not None and sliding_window < length
    if boundaries is None and (has_window or s_aux is not None):
        # scaled_dot_product_attention has neither windows nor sinks; the varlen kernel does. Each row becomes a sample.
        boundaries = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        longest = length
    if boundaries is not None:
        out = _packed_attention(query, key, value, boundaries, longest, dropout, scaling, sliding_window, s_aux)
    else:
        out = _causal_attention(query, key, value, dropout, scaling, None, None).transpose(1, 2).contiguous()
    return context_parallel.shard_tokens(out), None


def _packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention inside each sample of packed rows. Returns (rows, length, heads, head size)."""
    rows, _, length, _ = query.shape
    flat_query, flat_key, flat_value = (item.transpose(1, 2).flatten(0, 1) for item in (query, key, value))
    # Each is now (tokens, heads, head size).
    if query.is_cuda and query.dtype in HALF and not dropout:  # torch's flash attention, which has no dropout
        if sinks is not None:
            attended: torch.Tensor = flash_attention_with_sinks(
                flat_query, flat_key, flat_value, sinks, boundaries, longest, scaling, window
            )[0]
            return attended.view(rows, length, *attended.shape[1:])
        out: Any = varlen_attn(
            flat_query,
            flat_key,
            flat_value,
            boundaries,
            boundaries,
            longest,
            longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **GROUPED,
        )
        packed: torch.Tensor = out.unflatten(0, (rows, length))
        return packed
    each: torch.Tensor = _attend_each(flat_query, flat_key, flat_value, boundaries, dropout, scaling, window, sinks)
    return each.view(rows, length, *each.shape[1:])


# The compiler would take the sizes of samples for symbols, and spend minutes on them where heads are exchanged.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of one sample after another, for fp32, dropout and CPUs. All: (tokens, heads, head size)."""
    sizes = boundaries.diff().tolist()
    samples = zip(*(torch.split(item, sizes) for item in (query, key, value)), strict=True)
    outputs = []
    for sample in samples:
        sample_query, sample_key, sample_value = (item.transpose(0, 1)[None] for item in sample)
        attended = _causal_attention(sample_query, sample_key, sample_value, dropout, scaling, window, sinks)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def _causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention on (rows, heads, length, head size): each token sees itself and all tokens before it.

    With `window`, it sees only the last `window` of them, itself included.
    """
    length, mask = query.shape[2], None
    if sinks is not None or (window is not None and window < length):
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        mask = mask if window is None else mask.triu(1 - window)
    if sinks is not None and mask is not None:
        return attention_with_sinks(query, key, value, sinks, mask, dropout, scaling)
    with sdpa_kernel(BACKENDS, set_priority=True):
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
