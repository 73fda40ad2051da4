"""Computes output head and cross entropy as one operation, in chunks of tokens, so that all logits never exist at once.

Logits are computed only for tokens that are trained. The head runs inside the model's own forward, where FSDP and ZeRO-3 have
gathered its weight. All ranks call it equally often, whatever their batches train: with ZeRO-3 every call is a collective.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from jobs.model import known_architectures, router_loss
from jobs.model.saved_modules import trained_copy
from jobs.model.unwrap import causal_lm, stubbed_forwards

CHUNK = 2**28
"""Logits that exist at once: 1 GiB in fp32. Smaller chunks would add to the whole gradient of the head's weight more often."""
PARTS = 8
"""Chunks of a head that is not one plain matrix (one with an adapter). Fixed, so that all ranks call it equally often."""


def fuse(model: nn.Module, compiled: bool = False) -> bool:
    """Let the model's forward return the summed loss when it is given `trained` and `targets`; other calls stay as they were.

    `trained` (int64) are the positions of trained tokens in the flattened batch, and `targets` (int64) the tokens that follow
    them. `smoothing` is that of `train.label_smoothing`. With `real_tokens` (see `router_loss`), it returns the summed loss and the
    router loss, fp32 of shape (2,), if the model has a router loss. `compiled` compiles the softmax into one kernel. Call it after
    adapters are added and before sharding.

    Returns False, and changes nothing, for a model whose logits are more than its head applied to the last hidden state, for
    example scaled or soft-capped logits.
    """
    inner = causal_lm(model)
    head = trained_copy(inner.get_output_embeddings())
    if head is None or not _has_plain_head(inner, head):
        return False
    original = inner.forward
    is_plain_matrix = type(head) is nn.Linear
    if is_plain_matrix:
        _let_head_return_loss(head, compiled)

    def forward(
        *args: Any,
        trained: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        real_tokens: torch.Tensor | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        if trained is None or targets is None:
            return original(*args, **kwargs)
        set_kwargs = {
            name: value for name, value in kwargs.items() if value is not None
        }  # PEFT passes None for the others
        router = router_loss.attached(inner) if real_tokens is not None else None
        outputs = inner.base_model(*args, **set_kwargs, **({"output_router_logits": True} if router else {}))
        rows = outputs.last_hidden_state.flatten(0, 1).index_select(0, trained)
        loss = head(rows, targets, smoothing) if is_plain_matrix else _loss_in_parts(head, rows, targets, smoothing)
        return torch.stack([loss, router.mean(outputs.router_logits, real_tokens).float()]) if router else loss

    inner.forward = forward
    inner.muster_fused_head = True
    return True


def is_fused(inner: nn.Module) -> bool:
    """Whether `fuse` has changed this causal language model."""
    return bool(getattr(inner, "muster_fused_head", False))


def _has_plain_head(inner: Any, head: nn.Module) -> bool:
    """Whether the model's logits are its head applied to the last hidden state, and nothing else."""
    known = known_architectures.has_plain_head(inner)
    return _returns_head_output(inner, head) if known is None else known


def _returns_head_output(inner: Any, head: nn.Module) -> bool:
    """Run the model's own forward with stubs for the base model and the head, and look whether it changes their outputs."""
    hidden, logits = torch.randn(1, 2, 4), torch.randn(1, 2, 8)
    head_inputs: list[torch.Tensor] = []

    def stub_head(head_input: torch.Tensor) -> torch.Tensor:
        head_inputs.append(head_input)
        return logits

    outputs = MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        with stubbed_forwards({inner.base_model: lambda *_, **__: outputs, head: stub_head}):
            returned = inner.forward(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
        return len(head_inputs) == 1 and torch.equal(head_inputs[0], hidden) and torch.equal(returned, logits)
    except Exception:  # a model may bring any code; the unfused way then raises what must be raised
        return False


def _let_head_return_loss(head: nn.Linear, compiled: bool) -> None:
    """Let the head return the summed loss when it is called with targets. It stays a call of the module: ZeRO-3's hook on
    that call gathers the weight."""
    original = head.forward

    def forward(rows: torch.Tensor, targets: torch.Tensor | None = None, smoothing: float = 0.0) -> torch.Tensor:
        if targets is None:
            return original(rows)
        needs_grad = torch.is_grad_enabled()  # inside the autograd function it is always off
        rows = rows.to(head.weight.dtype)
        loss: torch.Tensor = FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, head.weight, head.bias, targets, smoothing, needs_grad, compiled
        )
        return loss

    head.forward = forward  # type: ignore[method-assign, assignment]


def _loss_in_parts(head: nn.Module, rows: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The summed loss through any head. Backward computes the logits a second time."""

    def part_loss(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(part).float(), part_targets, reduction="sum", label_smoothing=smoothing)

    parts = zip(rows.tensor_split(PARTS), targets.tensor_split(PARTS), strict=True)
    return torch.stack([checkpoint(part_loss, *part, use_reentrant=False) for part in parts]).sum()


class FusedCrossEntropy(torch.autograd.Function):
    """Cross entropy of `rows @ weight.T + bias`, summed in fp32.

    Forward computes the gradients too, chunk by chunk, so that no logits are kept or computed twice. Backward only multiplies
    them by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float,
        needs_grad: bool,
        compiled: bool,
    ) -> torch.Tensor:
        """rows (tokens, hidden), weight (vocabulary, hidden), bias (vocabulary,), targets (tokens,) int64 -> a scalar, fp32.

        `needs_grad`: whether gradients are enabled outside. `compiled`: use the compiled softmax.
        """
        for_rows, for_weight, for_bias = (needs_grad and needed for needed in ctx.needs_input_grad[:3])
        loss_and_grad = _compiled_loss_and_grad() if compiled and needs_grad else _loss_and_grad
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        grad_rows = torch.zeros_like(rows) if for_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        size = max(1, CHUNK // weight.shape[0])  # tokens in a chunk
        for begin in range(0, len(rows), size):
            chunk, chunk_targets = rows[begin : begin + size], targets[begin : begin + size]
            # The logits get no name here: it would keep them during the products below (0.5 GiB of 4,096 tokens in bf16).
            with_grad = for_rows or for_weight or for_bias
            chunk_loss, grad_logits = loss_and_grad(F.linear(chunk, weight, bias), chunk_targets, smoothing, with_grad)
            loss += chunk_loss
            if grad_rows is not None:
                torch.mm(grad_logits, weight, out=grad_rows[begin : begin + size])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ chunk
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        ctx.grads, ctx.dtype = (grad_rows, grad_weight, grad_bias), weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        rows, weight, bias = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads)
        ctx.grads = None  # they were scaled in place, so a second backward must fail
        return rows, *(None if grad is None else grad.to(ctx.dtype) for grad in (weight, bias)), None, None, None, None


def _loss_and_grad(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of logits (tokens, vocabulary) in fp32, and its gradient in the dtype of the logits.

    With `smoothing` s, the target of a token is 1 - s at its own column, plus s / vocabulary at each column, as in torch.
    Without `with_grad`, the second value has no meaning.
    """
    scores, target_columns = logits.float(), targets[:, None]
    normalizer = scores.logsumexp(-1, keepdim=True)
    loss = (normalizer - (1 - smoothing) * scores.gather(1, target_columns)).sum()
    if smoothing:
        loss = loss - smoothing * scores.mean(-1).sum()
    if not with_grad:
        return loss, logits
    probabilities = (scores - normalizer).exp()
    if smoothing:
        probabilities = probabilities - smoothing / logits.shape[1]
    if torch.compiler.is_compiling():
        # A comparison fuses into the kernel and stays in registers. A scatter would write fp32 values to memory first.
        columns = torch.arange(logits.shape[1], device=logits.device)
        grad = torch.where(columns == target_columns, probabilities - (1 - smoothing), probabilities)
        return loss, grad.to(logits.dtype)
    minus_target = torch.full_like(normalizer, smoothing - 1)
    return loss, probabilities.scatter_add_(1, target_columns, minus_target).to(logits.dtype)


@cache
def _compiled_loss_and_grad() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_loss_and_grad)
