"""Output head and cross entropy as one, in chunks of tokens: the logits of a whole batch never exist, and no untrained ones.

The head runs inside the model's own forward, where FSDP and ZeRO-3 have its weight whole, and is called equally often on all
ranks whatever they train: with ZeRO-3 every call is a collective.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from jobs.model.unwrap import causal_lm, stubbed_forwards

CHUNK = 2**28
"""Logits that exist at once: 1 GiB in fp32. Fewer would add up the head's gradient, of all its elements, more often."""
PARTS = 8
"""Chunks of a head that is more than one matrix, such as under an adapter: a fixed number, see above."""


def fuse(model: nn.Module, compiled: bool = False) -> bool:
    """Let the model's forward, given `trained` and `targets`, return their summed loss; otherwise it is as it was.

    `trained` (int64) are places in the batch, its rows laid end to end, and `targets` the tokens that follow them. Do this
    after adapters and before sharding. False, and nothing changed, for a model that does more than apply its head to the
    last hidden state, such as scaling its logits. `compiled` fuses the softmax into one kernel.
    """
    inside = causal_lm(model)
    head = inside.get_output_embeddings()
    if head is None or not _is_all(inside, head):
        return False
    whole = inside.forward
    plain = type(head) is nn.Linear
    if plain:
        _take_targets(head, compiled)

    def forward(
        *args: Any, trained: torch.Tensor | None = None, targets: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if trained is None or targets is None:
            return whole(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names all it knows
        hidden = inside.base_model(*args, **given).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, trained)
        return head(rows, targets) if plain else _in_parts(head, rows, targets)

    inside.forward = forward
    inside.muster_fused_head = True
    return True


def is_fused(inside: nn.Module) -> bool:
    return getattr(inside, "muster_fused_head", False)


def _is_all(inside: Any, head: nn.Module) -> bool:
    """Whether logits are the head of the last hidden state and nothing else: tried on the model's own code, without weights."""
    hidden, logits, seen = torch.randn(1, 2, 4), torch.randn(1, 2, 8), []

    def stub(given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return logits

    outputs = MoeModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[arg-type]
    try:
        with stubbed_forwards({inside.base_model: lambda *_, **__: outputs, head: stub}):
            found = inside.forward(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
    except Exception:  # of whatever code a model brings; the plain way then raises what must be raised
        return False
    return len(seen) == 1 and torch.equal(seen[0], hidden) and torch.equal(found, logits)


def _take_targets(head: nn.Linear, compiled: bool) -> None:
    """Let the head return the summed loss where it is given targets. As a call of the module, so that ZeRO-3 gathers it."""
    alone = head.forward

    def forward(rows: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return alone(rows)
        learns = torch.is_grad_enabled()  # inside the function it never is
        return FusedCrossEntropy.apply(rows.to(head.weight.dtype), head.weight, head.bias, targets, learns, compiled)

    head.forward = forward  # type: ignore[method-assign]


def _in_parts(head: nn.Module, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss through any head; its logits are computed once more in backward."""

    def loss(some: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(some).float(), expected, reduction="sum")

    parts = zip(rows.tensor_split(PARTS), targets.tensor_split(PARTS), strict=True)
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


class FusedCrossEntropy(torch.autograd.Function):
    """Cross entropy of `rows @ weight.T + bias`, summed in fp32. Gradients are made on the way forward, chunk by chunk, so
    that no logits are kept or computed again, and multiplied by the incoming one on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        learns: bool,
        compiled: bool,
    ) -> torch.Tensor:
        """rows (tokens, hidden), weight (vocabulary, hidden), targets (tokens,) int64 -> a scalar, fp32."""
        of_rows, of_weight, of_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        score = _compiled() if compiled and learns else _loss_and_grad
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        grads = [
            torch.zeros_like(rows) if of_rows else None,
            torch.zeros_like(weight, dtype=torch.float32) if of_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and of_bias else None,
        ]
        size = max(1, CHUNK // weight.shape[0])
        for begin in range(0, len(rows), size):
            some, wanted = rows[begin : begin + size], targets[begin : begin + size]
            part, grad = score(F.linear(some, weight, bias), wanted, of_rows or of_weight or of_bias)
            loss += part
            if grads[0] is not None:
                torch.mm(grad, weight, out=grads[0][begin : begin + size])
            if grads[1] is not None:
                grads[1] += grad.t() @ some
            if grads[2] is not None:
                grads[2] += grad.sum(0, dtype=torch.float32)
        ctx.grads, ctx.dtype = grads, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        rows, weight, bias = (None if grad is None else grad.mul_(factor) for grad in ctx.grads)
        ctx.grads = None  # they were scaled in place: a second backward must fail
        return rows, *(None if grad is None else grad.to(ctx.dtype) for grad in (weight, bias)), None, None, None


def _loss_and_grad(logits: torch.Tensor, targets: torch.Tensor, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of (tokens, vocabulary) in fp32, and its gradient in the precision of the logits."""
    scores, wanted = logits.float(), targets[:, None]
    total = scores.logsumexp(-1, keepdim=True)
    loss = (total - scores.gather(1, wanted)).sum()
    if not with_grad:
        return loss, logits
    chances = (scores - total).exp()
    if torch.compiler.is_compiling():  # stays in registers; scattered, it would go through memory in fp32
        places = torch.arange(logits.shape[1], device=logits.device)
        return loss, torch.where(places == wanted, chances - 1, chances).to(logits.dtype)
    return loss, chances.scatter_add_(1, wanted, torch.full_like(total, -1)).to(logits.dtype)


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_loss_and_grad)
