"""Tries before training whether a model keeps the samples of a packed row apart, with a tiny model of the same class.

Layers that are never told where a sample begins (recurrent layers, convolutions, some attention) mix the samples. The loss hardly
shows it: it changes by 1e-4 where gradients are wrong by 5 to 29 %. So the trial compares logits and gradients of samples in one
row with those of each sample alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conf.errors import ConfigError, Problem, first_line
from jobs.data import batches, token_dataset
from jobs.data.token_dataset import Part
from jobs.distributed.log_once import log_once
from jobs.model import shrink, unwrap
from jobs.training import sample_borders

LENGTHS = (13, 9, 6)
"""Tokens of the samples. Longer than the windows of `shrink` and than the kernels of convolutions."""
LIMITS = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference that can be rounding. Where samples leak, some gradient is off by more than 20 %."""
MAX_WEIGHTS = 200_000_000
"""A tiny model with more weights is not tried."""

Gradients = dict[str, torch.Tensor]


def choose_borders(model: Any, device: torch.device, ways: Sequence[str] = tuple(sample_borders.WAYS)) -> str:
    """The first of `ways` (keys of `sample_borders.WAYS`) in which this model keeps packed samples apart.

    `model` may be without weights. Raises ConfigError if there is none.
    """
    inner = unwrap.causal_lm(model)
    family = inner.config.get_text_config().model_type
    attention = inner.config._attn_implementation
    dtype = torch.bfloat16 if "flash_attention" in attention else torch.float32
    try:
        with _without_compiling(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            small, alone = _small_model(inner, attention, dtype, device)
    except _CannotTry as error:
        raise _refusal(family, f"a tiny {type(inner).__name__} cannot be tried ({error})") from error
    reasons = []
    for way in ways:
        with _without_compiling():
            difference, reason = _difference(small, alone, way, device)
        if difference <= LIMITS[dtype]:
            if way != sample_borders.DEFAULT:
                log_once(f"packing: {family} is told the borders of samples by {way}")
            return way
        reasons.append((difference, reason))
    difference, reason = min(reasons, key=lambda item: item[0])
    raise _refusal(family, f"{family} does not keep the samples of a row apart: {reason}")


def _without_compiling() -> Any:
    """Run what is marked for compilation as it is: compiling flex attention takes longer than this trial, for each length."""
    return torch.compiler.set_stance("force_eager")


class _CannotTry(Exception):
    """Raised where no tiny model of a family can be built or run."""


def _refusal(family: str, reason: str) -> ConfigError:
    return ConfigError(Problem("data.packing", True, f"{reason}. Set data.packing=false to train {family}"))


def _small_model(
    inner: Any, attention: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, tuple[list[torch.Tensor], Gradients]]:
    """A tiny model of the same class with large random weights, and its logits and gradients for each sample alone."""
    reason = "its config has no sizes"
    for config in shrink.configs(inner.config):
        try:
            with torch.device("meta"):
                weights = sum(item.numel() for item in type(inner)._from_config(config, dtype=dtype).parameters())
            if weights > MAX_WEIGHTS:
                reason = f"{weights:,} weights"
                break
            small = type(inner)._from_config(config, attn_implementation=attention, dtype=dtype).to(device).train()
            shrink.fill(small)
            return small, _alone(small, device)
        except Exception as error:  # any code of a model: widths of this config do not match
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise _CannotTry(reason)


def _samples() -> batches.Rows:
    """One row of several samples of random tokens."""
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    tokens = random.integers(3, shrink.VOCABULARY, size=offsets[-1]).astype(np.int32)
    samples = token_dataset.from_parts([Part(tokens, np.ones(len(tokens), np.uint8), offsets)])
    return batches.make_rows(samples, np.arange(len(LENGTHS)), pack_into=int(offsets[-1]))


def _alone(model: Any, device: torch.device) -> tuple[list[torch.Tensor], Gradients]:
    """Logits of each sample, and the gradients of their summed loss, every sample in a row of its own."""
    rows, logits = _samples(), []
    for sample in rows.packs.row(0).tolist():
        tokens = torch.from_numpy(rows.samples[sample][0].astype(np.int64))[None].to(device)
        out = model(input_ids=tokens, use_cache=False).logits[0].float()
        F.cross_entropy(out[:-1], tokens[0, 1:], reduction="sum").backward()
        logits.append(out.detach())
    return logits, _gradients(model)


def _difference(
    model: Any, alone: tuple[list[torch.Tensor], Gradients], borders: str, device: torch.device
) -> tuple[float, str]:
    """The largest relative difference of logits or gradients between packed samples and samples alone, and where it is."""
    rows, (expected_logits, expected) = _samples(), alone
    batch = batches.collate(rows, np.arange(1), pad=0, device=device)
    try:
        out = model(**sample_borders.model_inputs(batch, model.config, borders)).logits[0].float()
        targets = F.pad(batch.labels[0, 1:], (0, 1), value=batches.IGNORED)
        F.cross_entropy(out, targets, ignore_index=batches.IGNORED, reduction="sum").backward()
    except Exception as error:  # any code of a model: it does not take these arguments
        model.zero_grad()
        return float("inf"), f"{type(error).__name__}: {first_line(error)}"
    packed = torch.split(out.detach()[: sum(LENGTHS)], [len(item) for item in expected_logits])
    differences = [(_relative(*pair), "logits") for pair in zip(packed, expected_logits, strict=True)]
    gradients = _gradients(model)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        # a gradient that is tiny beside all others is rounding
        scale = torch.maximum(value.norm(), whole * 1e-4)
        differences.append((((gradients[name] - value).norm() / scale).item(), f"the gradient of {name}"))
    worst, where = max(differences)
    return worst, f"{where} is off by {100 * worst:.1f} %"


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _gradients(model: Any) -> Gradients:
    """The gradients of all weights in fp32, zero for those without one. Clears them in the model."""
    found = {
        name: torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad.float()
        for name, weight in model.named_parameters()
    }
    model.zero_grad()
    return found
