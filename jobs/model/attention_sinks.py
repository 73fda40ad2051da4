"""Attention sinks: a logit per head that joins the softmax without a value, as in gpt_oss. Fused (flash), or written out.

With the sink, each row of scores is divided by exp(lse) + exp(sink) instead of exp(lse), where lse is the logarithm of the sum of
the exponentials of the scores. Torch's flash kernel returns lse, so the sink is a factor on its output. Its backward recomputes
the probabilities from the lse that it is given. With the lse that includes the sink, it returns the right gradients of queries,
keys and values: the sink is then one more column of the softmax, whose value is zero.
"""

from typing import Any

import torch


@torch.library.custom_op("muster::flash_attention_with_sinks", mutates_args=())
def flash_attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with sinks inside each sample, on GPUs in bf16 or fp16.

    query: (tokens, heads, head size); key and value: the same, or with fewer heads. sinks: (heads,). boundaries: int32,
    cumulative lengths of samples, the longest of which has `longest` tokens. Returns the output in the shape of `query`, and lse
    with the sink: fp32, (heads, tokens).
    """
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, 0.0, window is None, False,
        scale=scale, **_window_sizes(window),
    )  # fmt: skip
    whole = torch.logaddexp(lse, sinks.float()[:, None])
    return (output * (lse - whole).exp().t()[..., None]).to(query.dtype), whole


@torch.library.custom_op("muster::flash_attention_with_sinks_backward", mutates_args=())
def flash_attention_with_sinks_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    boundaries: torch.Tensor,
    output: torch.Tensor,
    whole: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and sinks. `output` and `whole` are what forward has returned."""
    state, unused = (
        torch.zeros(2, dtype=torch.uint64, device=query.device),
        query.new_empty(0),
    )  # of dropout, which is off
    grads = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), query, key, value, output, whole, boundaries, boundaries, longest, longest, 0.0, window is None,
        state, unused, scale=scale, **_window_sizes(window),
    )  # fmt: skip
    share = (sinks.float() - whole.t()).exp()  # of the sink in each softmax: (tokens, heads)
    grad_sinks = -(share * (grad.float() * output.float()).sum(-1)).sum(0)
    return *grads, grad_sinks.to(sinks.dtype)


def _window_sizes(window: int | None) -> dict[str, int]:
    """How many tokens before and after itself a token sees. Without a window the kernel is told that it is causal instead."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


@flash_attention_with_sinks.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@flash_attention_with_sinks_backward.register_fake
def _(_grad: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(item) for item in inputs[:4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.longest, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    grads = flash_attention_with_sinks_backward(grad, *ctx.saved_tensors, ctx.longest, ctx.scale, ctx.window)
    return *grads, None, None, None, None


flash_attention_with_sinks.register_autograd(_backward, setup_context=_setup_context)


def attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """The same in plain operations, for any device and dtype. query: (rows, heads, length, head size); key and value: likewise.

    mask: which token sees which, boolean, broadcast to (rows, heads, length, length). Needs memory for all scores.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.float().masked_fill(~mask, -torch.inf)
    column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(query.dtype)
    return torch.nn.functional.dropout(shares, dropout) @ values
