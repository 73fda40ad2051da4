"""Loads a consolidated model, or a base model with its adapter, for evaluation and generation."""

from pathlib import Path
from typing import Any

import torch

from conf.errors import Problem, RunError
from conf.files import read_json
from conf.schema import Config
from jobs.model import stored_quantization
from jobs.tokenization.tokenizer import load_tokenizer, revision


def load(config: Config) -> Any:
    """RUN/model, spread over the GPUs of this job.

    With consolidate.adapter_only the adapter is loaded on top of its base model and is not merged into it. Raises RunError if
    the checkpoint has not been consolidated.
    """
    folder = Path(config.run_dir) / "model"
    if not (folder / "muster.json").exists():
        raise RunError(Problem("model", folder, "does not exist: consolidate a checkpoint first (muster merge RUN)"))
    return load_folder(folder, config, "auto", _device_map(config))


def load_base(config: Config) -> Any:
    """`model.source` as it was before training, spread over the GPUs of this job."""
    return _base(config, "auto", _device_map(config)).eval()


def load_folder(folder: Path, config: Config, dtype: torch.dtype | str, device_map: str | None = None) -> Any:
    """The model in a consolidated folder, or its adapter on top of `model.source`, ready for inference."""
    if not (folder / "adapter_config.json").exists():
        return _load(folder, config, dtype, device_map, revision="main").eval()
    from peft import PeftModel

    base, rows = _base(config, dtype, device_map), len(load_tokenizer(config))
    if rows > base.get_input_embeddings().num_embeddings:  # the adapter has rows for tokens that were added
        base.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(base, folder).eval()


def _base(config: Config, dtype: torch.dtype | str, device_map: str | None) -> Any:
    return _load(config.model.source, config, dtype, device_map, revision=revision(config))


def _load(
    source: str | Path, config: Config, dtype: torch.dtype | str, device_map: str | None, *, revision: str
) -> Any:
    """A model as it is stored, a multimodal one with its towers, a quantized one dequantized."""
    trust = config.model.trust_remote_code
    return stored_quantization.from_pretrained(
        str(source), revision, dtype, device_map=device_map, trust_remote_code=trust
    )


def _device_map(config: Config) -> str | None:
    return "auto" if config.cluster.inference.gpus_per_node and torch.cuda.is_available() else None


def describe(config: Config) -> str:
    """The model that `load` returns, in words: its checkpoint, its dtype, and whether its adapter is not merged."""
    info = read_json(Path(config.run_dir) / "model" / "muster.json") or {}
    adapter = ", adapter not merged" if info.get("adapter_only") else ""
    return f"{info.get('checkpoint', '?')} in {info.get('dtype', '?')}{adapter}"
