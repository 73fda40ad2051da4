"""Loads a consolidated model, or a base with its adapter, for evaluation and generation."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from conf.errors import Problem, RunError
from conf.files import read_json
from conf.schema import Config


def load(config: Config) -> Any:
    """RUN/model, spread over the GPUs this job has; an adapter alone (consolidate.adapter_only) on top of its base, unmerged.

    Raises RunError where it has not been consolidated.
    """
    folder = Path(config.run_dir) / "model"
    if not (folder / "muster.json").exists():
        raise RunError(Problem("model", folder, "is not there: consolidate first (make merge RUN=...)"))
    device_map = "auto" if config.cluster.inference.gpus_per_node and torch.cuda.is_available() else None
    return opened(folder, config, "auto", device_map)


def opened(folder: Path, config: Config, dtype: torch.dtype | str, device_map: str | None = None) -> Any:
    """The model in a folder that consolidation made, or its adapter on top of `model.source`, for inference."""
    how: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    from peft import PeftModel

    revision = config.model.revision or "main"
    base = AutoModelForCausalLM.from_pretrained(config.model.source, revision=revision, **how)
    return PeftModel.from_pretrained(base, folder).eval()


def told(config: Config) -> str:
    """What `load` gives, in words: the checkpoint it was made from, and whether an adapter is merged."""
    about = read_json(Path(config.run_dir) / "model" / "muster.json") or {}
    apart = ", adapter not merged" if about.get("adapter_only") else ""
    return f"{about.get('checkpoint', '?')} in {about.get('dtype', '?')}{apart}"
