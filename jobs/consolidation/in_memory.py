"""Merges models that cannot be streamed: loads everything into memory, and lets transformers write the folder."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from conf.choices import AdapterKind, Frozen, MergeBase
from conf.errors import DataError, Problem, RunError
from conf.files import new_folder, write_json
from conf.schema import Config
from jobs.checkpoint import checkpointing
from jobs.consolidation import live_check
from jobs.consolidation.execute import move_aside
from jobs.consolidation.prefixes import strip_prefixes
from jobs.consolidation.updates import read_tensor
from jobs.model import build
from jobs.tensor_io.open_checkpoint import Checkpoint
from jobs.tensor_io.reader import OpenFiles, Reader
from jobs.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def run(
    config: Config,
    checkpoint: Checkpoint,
    target: Path,
    *,
    muster_json: dict[str, Any],
    fingerprints: dict[str, str],
    compare: Callable[[Path], None],
) -> None:
    """Write `target`, after `compare` has accepted the new folder. One process only.

    Raises DataError if the checkpoint does not fit the model, RunError if a weight is not what training recorded.
    """
    if config.consolidate.base is MergeBase.dequantised:
        message = f"is not possible for {config.model.source}, which is merged in memory: set consolidate.base=original"
        raise DataError(Problem("consolidate.base", "dequantised", message))
    # the adapter is merged into the stored weights, not quantized ones
    adapter = replace(config.adapter, base=Frozen.full)
    model = build.build(replace(config, adapter=adapter))
    weights = _read_weights(checkpoint, [name for name, _ in model.named_parameters()])
    _check_weights(checkpoint, model, weights, fingerprints)
    model.load_state_dict(weights, strict=False)
    merged = model if config.adapter.kind is AdapterKind.none else _merged(model, target)
    if muster_json["dtype"] in build.DTYPES:
        merged = merged.to(build.DTYPES[muster_json["dtype"]])
    merged.config.use_cache = True
    if merged.generation_config is None:
        merged.generation_config = GenerationConfig.from_model_config(merged.config)
    move_aside(target)
    with new_folder(target) as folder:
        merged.save_pretrained(folder, max_shard_size=int(config.consolidate.shard_gib * 2**30))
        load_tokenizer(config).save_pretrained(folder)
        compare(folder)
        write_json(folder / "muster.json", muster_json | {"verified": True})
    log.info(f"model     {target}")


@torch.no_grad()
def _merged(model: Any, target: Path) -> Any:
    """The model with its adapter merged. Raises RunError if its logits changed, as they do if a tied weight has an adapter."""
    tokens = live_check.sample_tokens(model.config)
    expected = model.eval()(input_ids=tokens, use_cache=False).logits[0].float()
    merged = model.merge_and_unload()
    actual = merged(input_ids=tokens, use_cache=False).logits[0].float()
    live_check.check_logits(actual, expected, target, next(merged.parameters()).dtype)
    return merged


def _read_weights(checkpoint: Checkpoint, live_names: list[str]) -> dict[str, torch.Tensor]:
    files = OpenFiles()
    try:
        reader = Reader(files)
        stored = strip_prefixes(checkpoint.tensors, live_names)
        return {name: read_tensor(reader, tensor) for name, tensor in stored.items()}
    finally:
        files.close()


def _check_weights(
    checkpoint: Checkpoint, model: Any, weights: dict[str, torch.Tensor], fingerprints: dict[str, str]
) -> None:
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unknown = sorted(expected - weights.keys()), sorted(weights.keys() - model.state_dict().keys())
    if missing or unknown:
        message = (
            f"does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}; name the model that was trained"
        )
        raise DataError(Problem("checkpoint", checkpoint.folder, message))
    for name, fingerprint in fingerprints.items():
        if name not in weights or checkpointing.fingerprint(weights[name]) != fingerprint:
            message = (
                f"weight {name} differs from that in training: delete this checkpoint to go back to the one before"
            )
            raise RunError(Problem("checkpoint", checkpoint.folder, message))
