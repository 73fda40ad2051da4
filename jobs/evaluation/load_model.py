"""Loads a consolidated model, or a base model with its adapter, for evaluation and generation."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from conf.errors import Problem, RunError
from conf.files import read_json
from conf.schema import Config
from jobs.model import stored_quantization
from jobs.tokenization.tokenizer import revision


def load(config: Config) -> Any:
    """RUN/model, spread over the GPUs of this job.

    With consolidate.adapter_only the adapter is loaded on top of its base model and is not merged into it. Raises RunError if
    the checkpoint has not been consolidated.
    """
    folder = Path(config.run_dir) / "model"
    if not (folder / "muster.json").exists():
        raise RunError(Problem("model", folder, "does not exist: consolidate a checkpoint first (muster merge RUN)"))
    device_map = "auto" if config.cluster.inference.gpus_per_node and torch.cuda.is_available() else None
    return load_folder(folder, config, "auto", device_map)


def load_folder(folder: Path, config: Config, dtype: torch.dtype | str, device_map: str | None = None) -> Any:
    """The model in a consolidated folder, or its adapter on top of `model.source`, ready for inference."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": config.model.trust_remote_code,
    }
    model: Any
    if not (folder / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        return model.eval()
    from peft import PeftModel

    base = stored_quantization.from_pretrained(config.model.source, revision(config), **options)
    model = PeftModel.from_pretrained(base, folder)
    return model.eval()


def describe(config: Config) -> str:
    """The model that `load` returns, in words: its checkpoint, its dtype, and whether its adapter is not merged."""
    info = read_json(Path(config.run_dir) / "model" / "muster.json") or {}
    adapter = ", adapter not merged" if info.get("adapter_only") else ""
    return f"{info.get('checkpoint', '?')} in {info.get('dtype', '?')}{adapter}"
