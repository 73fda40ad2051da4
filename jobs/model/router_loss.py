"""Finds the loss with which a mixture of experts balances its experts, as the model's own class in transformers computes it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import MoeModelOutputWithPast

from conf.errors import ConfigError, Problem
from jobs.distributed.log_once import log_once
from jobs.model.saved_modules import trained_copy
from jobs.model.unwrap import causal_lm, stubbed_forwards

FUNCTION = "load_balancing_loss_func"
"""Name of transformers' function in the module of each model class that has such a loss."""
OTHER_LOSSES = ("router_z_loss_coef", "z_loss_coefficient", "z_loss_coef", "aux_loss_alpha", "aux_loss_coef")
"""Settings of further losses. Their models in transformers do not train them, or train them on all logits."""


@dataclass(frozen=True)
class RouterLoss:
    """The loss of all routers of a model."""

    coefficient: float
    """`router_aux_loss_coef` of config.json."""
    function: Callable[..., torch.Tensor]
    num_experts: int
    experts_per_token: int
    model: str
    """Name of the model's class."""

    def mean(self, router_logits: tuple[torch.Tensor, ...] | None, real_tokens: torch.Tensor | None) -> torch.Tensor:
        """The loss over the tokens of a micro batch, a scalar without the coefficient.

        router_logits: (tokens, experts) for each layer. real_tokens: (rows, length), 1 for tokens that are not padding.
        Raises ConfigError if the model returns none, as GraniteMoe did in transformers 5.17: training would leave the loss out.
        """
        if not router_logits:
            message = (
                f"of config.json asks for a router loss, but transformers {transformers.__version__} returns no router logits of "
                f"{self.model}. Install a newer transformers, or set it to false in config.json"
            )
            raise ConfigError(Problem("output_router_logits", True, message))
        return self.function(router_logits, self.num_experts, self.experts_per_token, real_tokens)


def attach(model: Any) -> None:
    """Set `muster_router_loss` of the causal language model: its RouterLoss, or None if config.json does not ask for it.

    Logs each loss in config.json that is not trained, with the setting that decides it.
    """
    inner = causal_lm(model)
    inner.muster_router_loss = _find(inner)


def attached(inner: Any) -> RouterLoss | None:
    """What `attach` has set."""
    found: RouterLoss | None = getattr(inner, "muster_router_loss", None)
    return found


def _find(inner: Any) -> RouterLoss | None:
    config = inner.config.get_text_config()
    for name in OTHER_LOSSES:
        if getattr(config, name, None):
            log_once(f"router loss: {name}={getattr(config, name)} of config.json is off: Muster does not train it")
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if not coefficient:
        return None
    if not getattr(config, "output_router_logits", False):
        reason = "output_router_logits=false; set it to true in config.json to train it"
        log_once(f"router loss: router_aux_loss_coef={coefficient} of config.json is off: {reason}")
        return None
    arguments = _arguments(inner)
    if arguments is None:
        reason = f"{type(inner).__name__} has no such loss"
        log_once(f"router loss: router_aux_loss_coef={coefficient} of config.json is off: {reason}")
        return None
    log_once(f"router loss: router_aux_loss_coef={coefficient} of config.json is trained")
    return RouterLoss(float(coefficient), *arguments, type(inner).__name__)


def _arguments(inner: Any) -> tuple[Callable[..., torch.Tensor], int, int] | None:
    """The loss function of the model's class, and the numbers of experts that its forward passes to it.

    They are found by running that forward with stubs for the base model, the head and the function.
    """
    module = sys.modules[type(inner).__module__]
    function = getattr(module, FUNCTION, None)
    if function is None:
        return None
    calls: list[tuple[int, int]] = []

    def record(_: Any, num_experts: int, top_k: int, *__: Any) -> torch.Tensor:
        calls.append((int(num_experts), int(top_k)))
        return torch.zeros(())

    hidden = torch.zeros(1, 2, 4)
    outputs = MoeModelOutputWithPast(last_hidden_state=hidden, router_logits=(torch.zeros(2, 2),))
    head = trained_copy(inner.get_output_embeddings())
    setattr(module, FUNCTION, record)
    try:
        with stubbed_forwards({inner.base_model: lambda *_, **__: outputs, head: lambda _: torch.zeros(1, 2, 8)}):
            inner.forward(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False, output_router_logits=True)
    except Exception:  # a model may bring any code
        return None
    finally:
        setattr(module, FUNCTION, function)
    return (function, *calls[0]) if len(calls) == 1 else None
