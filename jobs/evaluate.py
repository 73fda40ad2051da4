"""Held-out loss of the consolidated model, as a user would load it: whole, or as a base with its adapter apart."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from conf.batch import rows_at_once
from conf.errors import Problem, RunError
from conf.files import read_json, write_json
from conf.schema import Config
from jobs.data import batches
from jobs.distributed.process_group import World
from jobs.model.build import tokenizer
from jobs.training import loss


def run(config: Config) -> None:
    """Write RUN/evaluate.json: mean loss over the held-out tokens, perplexity, tokens."""
    whole = load(config)
    rows = batches.read(Path(config.run_dir) / "data", "validation")
    alone = World(rank=0, size=1, local_rank=0, local_size=1, device=whole.device)
    pad = tokenizer(config).pad_token_id
    summed, tokens = loss.held_out(whole, rows, rows_at_once(config), pad, alone).tolist()
    found = {
        "loss": summed / tokens,
        "perplexity": math.exp(min(summed / tokens, 700)),
        "tokens": int(tokens),
        "model": told(config),
    }
    write_json(Path(config.run_dir) / "evaluate.json", found)
    print(
        f"held-out loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f} over {found['tokens']} tokens",
        flush=True,
    )


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
