"""Held-out loss of the consolidated model, as a user would load it."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.errors import Problem, RunError
from conf.files import write_json
from conf.schema import Config
from jobs import data, loss
from jobs.model import tokenizer


def run(config: Config) -> None:
    """Write RUN/evaluate.json: mean loss over the held-out tokens, perplexity, tokens."""
    whole = load(config)
    rows = data.read(Path(config.run_dir) / "data", "validation")
    summed, tokens = loss.held_out(
        whole, rows, config.train.micro_batch, tokenizer(config).pad_token_id, whole.device
    ).tolist()
    found = {"loss": summed / tokens, "perplexity": math.exp(min(summed / tokens, 700)), "tokens": int(tokens)}
    write_json(Path(config.run_dir) / "evaluate.json", found)
    print(
        f"held-out loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f} over {found['tokens']} tokens",
        flush=True,
    )


def load(config: Config) -> PreTrainedModel:
    """RUN/model, spread over the GPUs this job has. Raises RunError where it has not been consolidated."""
    folder = Path(config.run_dir) / "model"
    if not (folder / "muster.json").exists():
        raise RunError(Problem("model", folder, "is not there: consolidate first (make merge RUN=...)"))
    device_map = "auto" if config.cluster.inference.gpus_per_node and torch.cuda.is_available() else None
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device_map)
    return found.eval()
