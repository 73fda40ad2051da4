"""Recognizes files of other programs that describe no training, and says what Muster has instead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Problem
from launcher.convert.keys import Outcome
from launcher.convert.sharding_keys import fsdp_config

TRAINS = {
    "dataset",
    "datasets",
    "dataset_name",
    "pretraining_dataset",
    "stage",
    "num_train_epochs",
    "micro_batch_size",
    "cached_dataset",
}
"""Keys that only a training has."""
TRAINING = "Import the file of the training"


def refuse(config: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError, with what to do instead, if the file describes no training."""
    if message := _message(config, path):
        raise ConfigError(Problem("FILE", path, message))


def _message(config: Mapping[str, Any], path: Path) -> str | None:
    names = set(config)
    if {"compute_environment", "distributed_type"} & names:
        return f"is a config of `accelerate launch`: it shards, but trains nothing. {TRAINING}, and choose {_layout(config)}"
    if {"zero_optimization", "train_micro_batch_size_per_gpu"} & names:
        return f"is a DeepSpeed JSON. {TRAINING} that names it, or set parallel.deepspeed_config={path}"
    if {"fsdp", "fsdp_config"} >= names:
        return f"has settings of FSDP only. {TRAINING}, and choose {_layout(config)}"
    if {"provider", "dockerfile_commands", "gpu_count"} & names and not TRAINS & names:
        return f"describes machines of a cloud. Muster runs on a Slurm cluster or on this machine: cluster=slurm. {TRAINING}"
    if {"train_dataset", "dist_config", "kernel_config", "peft_config"} & names:
        return (
            "is in LLaMA-Factory's v1 format, which is not imported. Write it in the other format (stage, finetuning_type, "
            "dataset, template), or run it as it is: pipeline=custom custom.command=... (docs/own-trainer.md)"
        )
    if "export_dir" in names and not TRAINS & names:
        return (
            "merges or exports a model. Muster's pipeline=finetune merges after training, `muster merge RUN` by hand; "
            "weights in 4 bits are made by other tools (docs/merge.md)"
        )
    if {"sampler_type", "sampler_engine", "num_return_sequences"} & names:
        return f"samples answers of a model and trains nothing. {TRAINING}"
    if not TRAINS & names and (ANSWERS & names or {"model_name_or_path", "template"} <= names):
        return (
            "lets a model answer and trains nothing. In Muster: pipeline=evaluate with generate.prompts=FILE (docs/evaluate.md), "
            "or serve RUN/model (docs/serve.md)"
        )
    if not TRAINS & names and config and all(_is_token(name) for name in names):
        return "lists new tokens. Write them into data.special_tokens, beside the import of the training"
    return None


ANSWERS = {"infer_backend", "max_new_tokens", "temperature", "top_p", "vllm_maxlen"}


def _is_token(name: str) -> bool:
    return name.startswith("<") and name.endswith(">")


def _layout(config: Mapping[str, Any]) -> str:
    """Muster's words for the layout of an Accelerate config."""
    stage = dict(config.get("deepspeed_config") or {}).get("zero_stage")
    if stage is not None:
        layout = f"zero{stage}" if stage else "ddp"
    elif isinstance(config.get("fsdp_config"), Mapping):
        row = fsdp_config("fsdp_config", config["fsdp_config"], {})
        layout = row.ours.get("/parallel", "fsdp") if row.outcome is not Outcome.refused else "fsdp"
    else:
        layout = "ddp"
    gpus = config.get("num_processes")
    return f"parallel={layout}" + (f" with --gpus {gpus}" if isinstance(gpus, int) else "")
