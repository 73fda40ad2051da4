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
from jobs.consolidation.multimodal import check_towers, write_config
from jobs.consolidation.prefixes import strip_prefixes
from jobs.consolidation.updates import read_tensor
from jobs.model import build, multimodal
from jobs.tensor_io import safetensors
from jobs.tensor_io.model_files import find_or_download
from jobs.tensor_io.open_checkpoint import Checkpoint
from jobs.tensor_io.reader import OpenFiles, Reader
from jobs.tokenization.tokenizer import load_tokenizer, revision

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
    # the adapter is merged into the stored weights, not quantized ones; the checkpoint has all of its weights
    adapter = replace(config.adapter, base=Frozen.full, source=None)
    model = build.build(replace(config, adapter=adapter))
    weights = _read_weights(checkpoint, [name for name, _ in model.named_parameters()])
    _check_weights(checkpoint, model, weights, fingerprints)
    model.load_state_dict(weights, strict=False)
    merged = model if config.adapter.kind is AdapterKind.none else _merged(model, target)
    if muster_json["dtype"] in build.DTYPES:
        merged = merged.to(build.DTYPES[muster_json["dtype"]])
    untied = _untie(merged)
    whole, dtype = multimodal.whole_of(merged), next(merged.parameters()).dtype
    if whole is not None:
        merged = _inside(whole, merged, config)
    merged.config.use_cache = True
    if merged.generation_config is None:
        merged.generation_config = GenerationConfig.from_model_config(merged.config)
    move_aside(target)
    with new_folder(target) as folder:
        merged.save_pretrained(folder, max_shard_size=int(config.consolidate.shard_gib * 2**30))
        if whole is not None:
            _finish_whole(whole, folder, config, dtype, untied=untied)
        load_tokenizer(config).save_pretrained(folder)
        compare(folder)
        write_json(folder / "muster.json", muster_json | {"verified": True})
    log.info(f"model     {target}")


@torch.no_grad()
def _inside(whole: multimodal.WholeModel, text: Any, config: Config) -> Any:
    """The multimodal model with this text, and everything else as it is stored."""
    auto_class, source = multimodal.auto_class(whole.config), config.model.source
    stored = auto_class.from_pretrained(source, revision=revision(config), dtype="auto")
    for name, value in text.state_dict().items():
        stored.get_parameter_or_buffer(whole.name(name)).data = value
    return stored


def _untie(merged: Any) -> bool:
    """Let the config say so if the output head is not the embedding: `modules_to_save` trains copies. Returns whether it is not."""
    ends = [merged.get_input_embeddings(), merged.get_output_embeddings()]
    untied = merged.config.get_text_config().tie_word_embeddings and ends[0].weight is not ends[1].weight
    if untied:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return bool(untied)


def _finish_whole(
    whole: multimodal.WholeModel, folder: Path, config: Config, dtype: torch.dtype, *, untied: bool
) -> None:
    """Check the towers of a written multimodal model, and write the base's config.json and processor."""
    base = find_or_download(config.model.source, config.model.revision)
    assert base is not None  # training has read its files
    check_towers(whole, folder, safetensors.find_tensors(base))
    write_config(folder, base, whole.config, str(dtype).removeprefix("torch."), untied=untied)


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
