"""Held-out loss of the consolidated model, as a user would load it: whole, or as a base with its adapter apart."""

import logging
import math
from pathlib import Path

from conf.batch import micro_batch_limit
from conf.files import write_json
from conf.schema import Config
from jobs.data import batches
from jobs.distributed.process_group import World
from jobs.evaluation.load_model import load, told
from jobs.tokenization.tokenizer import load_tokenizer
from jobs.training import loss

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/evaluate.json: mean loss over the held-out tokens, perplexity, tokens."""
    whole = load(config)
    rows = batches.load_split(Path(config.run_dir) / "data", "validation")
    alone = World(rank=0, size=1, local_rank=0, local_size=1, device=whole.device)
    pad = load_tokenizer(config).pad_token_id
    summed, tokens = loss.evaluate(whole, rows, micro_batch_limit(config), pad, alone).tolist()
    found = {
        "loss": summed / tokens,
        "perplexity": math.exp(min(summed / tokens, 700)),
        "tokens": int(tokens),
        "model": told(config),
    }
    write_json(Path(config.run_dir) / "evaluate.json", found)
    log.info(f"held-out loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f} over {found['tokens']} tokens")
